"""List of the run folders below a folder, with the state and score of each."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cl_dist.errors import ClDistError, ConfigError
from cl_dist.run import Run
from cl_dist.run_events import read_state
from cl_dist.run_folder import reopen
from cl_dist.stage import ref
from cl_dist.stored_run import status_of


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run folder below another folder."""

    run: str
    """Its path below that folder; a baseline comes as NAME/baselines/BASELINE."""
    method: str | None
    tasks_done: int | None
    """Tasks whose stages are all finished."""
    tasks: int | None
    score: float | None
    """Average score over the learned tasks, after the last of them: `cl/avg_acc`."""
    status: str
    """As in `Progress`, or "unreadable"."""
    updated: str
    """Time of the last change of its state, in UTC."""
    age_s: float
    fault: str | None = None
    """Why it cannot be read."""


def list_runs(root: Path) -> list[ListedRun]:
    """Return the runs below a folder, the latest first, each followed by its baselines.

    Raises:
        ConfigError: If the path is not a folder.
    """
    if not root.is_dir():
        raise ConfigError(f"FOLDER={str(root)!r}: expected a folder of run folders, such as runs")
    groups = [[_listed(folder, root) for folder in (main, *_baselines(main))] for main in _run_folders(root)]
    return [line for group in sorted(groups, key=lambda group: group[0].age_s) for line in group]


def _run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders that hold a run, without descending into one."""
    for path, folders, files in os.walk(root):
        if "config.yaml" in files:
            folders.clear()
            yield Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _baselines(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("baselines/*/config.yaml"))


def _listed(folder: Path, root: Path) -> ListedRun:
    changed = max(path.stat().st_mtime for name in ("config.yaml", "run.json") if (path := folder / name).exists())
    updated = datetime.fromtimestamp(changed, UTC)
    age = (datetime.now(UTC) - updated).total_seconds()
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    when = updated.isoformat(timespec="seconds").replace("+00:00", "Z")
    try:
        run = Run(reopen(folder))
        done = sum(
            all(run.ledger.manifest(ref(stage)) is not None for stage in run.plan(task))
            for task in range(len(run.tasks))
        )
        method, status = run.config.science.method.name, status_of(read_state(folder))
        return ListedRun(name, method, done, len(run.tasks), _score(folder), status, when, max(age, 0.0))
    except (ClDistError, OSError) as error:
        fault = (str(error).splitlines() or [type(error).__name__])[0]
        return ListedRun(name, None, None, None, None, "unreadable", when, max(age, 0.0), fault)


def _score(folder: Path) -> float | None:
    """Return the average score of the summary; None before the first task is scored."""
    try:
        value = json.loads((folder / "metrics" / "summary.json").read_text(encoding="utf8"))
        found = value["metrics"]["cl/avg_acc"]["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(found) if isinstance(found, int | float) else None
