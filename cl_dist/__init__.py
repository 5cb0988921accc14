"""Distributed continual learning of transformer language models.

    from cl_dist import train, load_run

    run = train("run.yaml")
    run.summary()["metrics"]["cl/avg_acc"]["value"]
    load_run("runs/run").predict("task", ["a text", "another text"])

Names are imported at their first use: `import cl_dist` imports neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_dist.models.plugin import CtrClassifier
    from cl_dist.session import resume, train
    from cl_dist.stages.export import load_exported
    from cl_dist.stored_run import StoredRun, load_run

__version__ = "0.1.0"
__all__ = ["CtrClassifier", "StoredRun", "load_exported", "load_run", "resume", "train"]
_MODULES = {
    "CtrClassifier": "cl_dist.models.plugin",
    "StoredRun": "cl_dist.stored_run",
    "load_exported": "cl_dist.stages.export",
    "load_run": "cl_dist.stored_run",
    "resume": "cl_dist.session",
    "train": "cl_dist.session",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'cl_dist' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
