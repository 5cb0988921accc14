"""Run folders: open one, find the latest, append tasks to its run file, write the run file into it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from cl_dist.config import Tree, apply_overrides, parse, plain_yaml, read_yaml
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import ConfigError
from cl_dist.ledger import write_text
from cl_dist.run_config import NAME, NAME_TEXT, RunConfig
from cl_dist.storage import written
from cl_dist.strict_yaml import yaml_text

NEW_TASKS = "a mapping `tasks: [...]` with tasks as in a run file, and no other key"


def reopen(folder: Path, overrides: Sequence[str] = (), added: Path | None = None) -> RunConfig:
    """Read the run file of an existing run folder; `added` is a YAML file of tasks to append.

    The folder's own location replaces run.dir and run.name, so a run folder may be moved.

    Raises:
        ConfigError: If the path is not a run folder, if its name is not valid for a run, or if overrides name another
            folder.
    """
    if folder.name in ("", "..") or folder.is_symlink():
        folder = folder.resolve()  # its own name, not that of `.` or of a link
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"RUN={str(folder)!r}: expected a run folder, with config.yaml in it; `cl-dist train` makes one"
        )
    if not re.fullmatch(NAME, folder.name):
        raise ConfigError(
            f"RUN={str(folder)!r}: a run takes the name of its folder, and {folder.name!r} is not a valid name: "
            f"expected {NAME_TEXT}; rename the folder"
        )
    tree = plain_yaml(path)
    tree["run"] = {**tree.get("run", {}), "name": folder.name, "dir": str(folder.parent)}
    if added is not None:
        tree = _with_tasks(tree, added)
    config = parse(RunConfig, apply_overrides(tree, overrides))
    if config.folder.resolve() != folder.resolve():
        raise ConfigError(
            f"run.dir={config.run.dir!r}, run.name={config.run.name!r}: a run resumes in its own folder, {folder}. "
            f"To work in another place, move that folder and resume it there: "
            f"{shlex.join(['mv', str(folder), str(config.folder)])}"
        )
    return config


def _with_tasks(tree: Tree, path: Path) -> Tree:
    """Return a run file with the tasks of another file appended, in that file's order.

    Raises:
        ConfigError: If the file has no tasks, or one that the run already has.
    """
    if not path.is_file():
        raise ConfigError(f"--add-tasks {str(path)!r}: no such file")
    found = read_yaml(path, NEW_TASKS)
    new = found.get("tasks")
    if not isinstance(new, list) or not new or set(found) != {"tasks"}:
        raise ConfigError(f"{path}: expected {NEW_TASKS}")
    config = parse(RunConfig, tree).science
    order = [task.id for task in config.sequence().tasks]
    if strange := [number for number, task in enumerate(new) if not isinstance(task, dict)]:
        raise ConfigError(
            f"{path}: tasks.{strange[0]}={new[strange[0]]!r:.100}: expected a task, {{id: ..., source: ...}}"
        )
    ids = [parse(TaskConfig, task, f"{path}: tasks.{number}.").id for number, task in enumerate(new)]
    if known := sorted(set(order) & set(ids)):
        raise ConfigError(
            f"{path}: the run already has {', '.join(known)}; `cl-dist resume` without --add-tasks continues it"
        )
    kept = {name: value for name, value in tree["science"].items() if name != "order_file"}
    orders = {name: [*known, *ids] for name, known in config.named_orders().items()}  # baselines may name them
    tasks = [*tree["science"]["tasks"], *new]
    baselines = {
        name: {**over, "order": [*over["order"], *ids]} if isinstance(over.get("order"), list) else over
        for name, over in tree.get("baselines", {}).items()
    }
    science = {**kept, "tasks": tasks, "orders": orders, "order": [*order, *ids]}
    return {**tree, "science": science, "baselines": baselines}


def latest(root: Path) -> Path:
    """Return the run folder under root whose run.json changed last.

    Raises:
        ConfigError: If there is none.
    """
    found = sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run under {str(root)!r}: name a run folder")
    return found[-1].parent


def save(config: RunConfig, source: Path | None = None) -> None:
    """Write the resolved run file, and a copy of its source, to the run folder.

    Raises:
        StorageError: If they cannot be written.
    """
    copy = config.folder / "config.source.yaml"
    texts = {config.folder / "config.yaml": yaml_text(config.tree())}
    if source is not None and source.resolve() != copy.resolve():
        texts[copy] = source.read_text(encoding="utf8")
    with written(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            if not path.exists() or path.read_text(encoding="utf8") != text:
                write_text(path, text)
