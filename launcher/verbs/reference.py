"""The verbs `list`, `schema` and `env`."""

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from cl_dist.errors import ConfigError
from cl_dist.methods import descriptions
from cl_dist.metrics import FORMULAS
from cl_dist.run_config import json_schema
from launcher import console, runs
from launcher.options import AsJson

LISTS: dict[str, Callable[[], Mapping[str, str]]] = {
    "methods": descriptions,
    "recipes": lambda: {name: _first_comment(path) for name, path in runs.recipes().items()},
    "metrics": lambda: FORMULAS,
}
PACKAGES = ("cl-dist", "torch", "deepspeed", "accelerate", "transformers", "datasets", "ray", "peft", "safetensors")


def list_(
    what: Annotated[str, typer.Argument(help="methods, recipes or metrics", autocompletion=lambda: list(LISTS))],
    as_json: AsJson = False,
) -> None:
    """List the methods, recipes or metrics."""
    if what not in LISTS:
        raise ConfigError(f"list {what}: expected one of {', '.join(LISTS)}")
    entries = LISTS[what]()
    if as_json:
        console.document(entries)
        return
    for name, about in entries.items():
        console.out.print(f"{name:24} {about}", soft_wrap=True)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf8").splitlines()[0].removeprefix("#").strip()


def schema() -> None:
    """Print the JSON Schema of run files: every setting with its type, default and description."""
    console.document(json_schema())


def env(as_json: AsJson = False) -> None:
    """Print the versions and the machine, for a bug report."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if as_json:
        console.document(facts)
        return
    for name, value in facts.items():
        console.out.print(f"{name:14} {value}")
