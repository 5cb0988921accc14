"""A run with its baselines: finding run files and folders, running, and bringing the results together."""

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from cl_dist import sequence
from cl_dist.checks import check_data, check_tokens, check_writing
from cl_dist.config import Tree, apply_overrides, did_you_mean, parse, plain_yaml, read_yaml, yaml_text
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import ClDistError, ConfigError, DataError, StoppedError
from cl_dist.ledger import write_json, write_text
from cl_dist.run import Run
from cl_dist.run_config import NAME, NAME_TEXT, RunConfig
from cl_dist.run_events import Tracker, Watcher, read_state, summary
from cl_dist.sinks import Trackers
from cl_dist.stage import flat
from cl_dist.storage import run_lock, written
from launcher import console
from launcher.report.page import write_report

log = logging.getLogger(__name__)
RECIPES = files("launcher") / "recipes"
NEW_TASKS = "a mapping `tasks: [...]` with tasks as in a run file, and nothing else"


def recipes() -> dict[str, Path]:
    """Return the named run files that come with the package."""
    return {
        Path(str(entry)).stem: Path(str(entry))
        for entry in sorted(RECIPES.iterdir(), key=str)
        if entry.name.endswith(".yaml")
    }


def run_file(name: str) -> Path:
    """Return the run file of a path or recipe name.

    Raises:
        ConfigError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"CONFIG={name!r}: expected a run file or the name of a recipe{did_you_mean(name, list(known))}"
        )
    return known[name]


def reopen(folder: Path, overrides: list[str], added: Path | None = None) -> RunConfig:
    """Read the run file of an existing run folder.

    The run is looked for where the folder is now, so that a folder may be moved. added is a file of tasks to append.

    Raises:
        ConfigError: If it is no run folder, or its name is none for a run, or if overrides set another folder.
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
            f"RUN={str(folder)!r}: a run has the name of its folder, and {folder.name!r} is none: "
            f"expected {NAME_TEXT}; rename the folder"
        )
    tree = plain_yaml(path)
    tree["run"] = {**tree.get("run", {}), "name": folder.name, "dir": str(folder.parent)}
    if added is not None:
        tree = _with_tasks(tree, added)
    config = parse(RunConfig, apply_overrides(tree, overrides))
    if config.folder.resolve() != folder.resolve():
        raise ConfigError(
            f"run.dir={config.run.dir!r}, run.name={config.run.name!r}: a run is resumed in its own folder, {folder}, "
            f"with what it holds. To work in another place, move that folder and resume it there: "
            f"{shlex.join(['mv', str(folder), str(config.folder)])}"
        )
    return config


def _with_tasks(tree: Tree, path: Path) -> Tree:
    """Return a run file with the tasks of another file appended, to be learned last and in that file's order.

    Raises:
        ConfigError: If the file holds no tasks, or one that the run has.
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
            f"{path}: the run has {', '.join(known)} already; `cl-dist resume` without --add-tasks goes on with it"
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
    """Return the run folder below root that was worked on last.

    Raises:
        ConfigError: If there is none.
    """
    found = sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run below {str(root)!r}: name a run folder")
    return found[-1].parent


def save(config: RunConfig, source: Path | None = None) -> None:
    """Write the resolved run file, and its source, to its folder, once its settings have been accepted."""
    copy = config.folder / "config.source.yaml"
    texts = {config.folder / "config.yaml": yaml_text(config.tree())}
    if source is not None and source.resolve() != copy.resolve():
        texts[copy] = source.read_text(encoding="utf8")
    with written(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            if not path.exists() or path.read_text(encoding="utf8") != text:
                write_text(path, text)


def execute(
    config: RunConfig, command: str, baselines: bool = True, source: Path | None = None
) -> dict[Path, dict[str, Any]]:
    """Compute what is missing of a run and its baselines; return their summaries by folder, the run's own first.

    Nothing is started before every setting and every row has been checked, nor where nothing is missing.
    """
    configs = [config, *(config.baseline(name) for name in config.baselines if baselines)]
    _brought_back(configs)
    all_runs = [Run(each) for each in configs]
    check_data(all_runs[0])
    for run in all_runs:
        run.ledger.check_order()
    missing = [bool(sequence.remaining(run)) for run in all_runs]  # refuses conflicts before anything is written
    for run, needed in zip(all_runs, missing, strict=True):
        if needed:
            check_tokens(run)
            check_writing(run)
    with _only_driver(configs):
        for each in configs:
            save(each, source if each is config else None)
        handler = console.log_to(config.folder / "logs" / "driver.log")
        dispatcher: Any = None
        try:
            with console.Watch() as watch:
                if any(missing):
                    dispatcher = _dispatcher(config)
                for run, needed in zip(all_runs, missing, strict=True):
                    tracker = Tracker(run, command, _watched(run.config, watch))
                    if needed:
                        _run(run, dispatcher, tracker)
                    elif read_state(run.config.folder).get("status") != "finished":
                        tracker.begin([], set())  # killed between the last stage and the end
                        tracker.finish()
                    elif run.config.run.mirror is not None:
                        from launcher.mirror import Mirror

                        Mirror(run.config).push()  # killed while that was copied, perhaps
        finally:
            if dispatcher is not None:
                dispatcher.close()
            logging.getLogger("cl_dist").removeHandler(handler)
    return conclude(config)


@contextmanager
def _only_driver(configs: list[RunConfig]) -> Iterator[None]:
    """Hold the folders of a run and of its baselines, which can be resumed by themselves."""
    with ExitStack() as held:
        for config in configs:
            held.enter_context(run_lock(config.folder))
        yield


def _watched(config: RunConfig, watch: Watcher) -> Watcher:
    """Return what sees the events of a run: the terminal, and the trackers and the mirror that the run file names."""
    watchers = [watch]
    if config.run.trackers:
        settings = flat(config.tree()["science"])
        watchers.append(Trackers(config.run.trackers, config.folder, config.run.name, settings))
    if config.run.mirror is not None:
        from launcher.mirror import Mirror, Mirroring

        watchers.append(Mirroring(Mirror(config)))

    def all_of_them(event: Mapping[str, Any]) -> None:
        for each in watchers:
            each(event)

    return all_of_them


def _brought_back(configs: list[RunConfig]) -> None:
    """Bring back what the mirrors of runs hold and their folders lack."""
    mirrored = [config for config in configs if config.run.mirror is not None]
    if mirrored:
        from launcher.mirror import Mirror

        with _only_driver(mirrored):
            for config in mirrored:
                Mirror(config).pull()


def _run(run: Run, dispatcher: Any, tracker: Tracker) -> None:
    try:
        sequence.run_stages(run, dispatcher, tracker)
    except (KeyboardInterrupt, StoppedError) as error:
        _end(tracker, "stopped" if isinstance(error, StoppedError) else "interrupted")
        raise
    except BaseException as error:
        if isinstance(error.__cause__, StoppedError):  # told in the middle of Ray's compiled code, which wraps it
            _end(tracker, "stopped")
            raise error.__cause__ from None
        _end(tracker, "failed")
        raise


def _end(tracker: Tracker, status: str) -> None:
    """Note how a run has ended; what ended it, a full disk say, stays the error that is told."""
    try:
        tracker.finish(status)
    except (OSError, ClDistError) as error:
        log.warning("run.json does not tell that the run has %s: %s", status, error)


def _dispatcher(config: RunConfig) -> Any:
    """Return the dispatcher that the run file names; imported late, since both need torch."""
    if config.cluster.dispatcher == "local":
        from cl_dist.dispatch_local import LocalDispatcher

        return LocalDispatcher()
    from cl_dist.dispatch_ray.dispatcher import RayDispatcher

    return RayDispatcher(config.cluster, config.folder)


def conclude(config: RunConfig, references: Mapping[str, Path] | None = None) -> dict[Path, dict[str, Any]]:
    """Return the summaries of a run and of its baselines, by folder, with their references filled in.

    A baseline of the method `individual` or `joint` serves as reference to the others; `references` names other runs.

    Raises:
        ConfigError: If a reference is of another method.
        DataError: If a reference was computed on other rows.
        StageConflictError: If rows have changed since they were learned or scored.
    """
    run = Run(config)
    others = [Run(each) for each in _begun_baselines(config)]
    sources = {other.config.science.method.name: other for other in others}
    sources |= {kind: Run(reopen(folder, [])) for kind, folder in (references or {}).items()}
    for kind, folder in (references or {}).items():
        if (method := sources[kind].config.science.method.name) != kind:
            raise ConfigError(f"{kind}={folder}: its method is {method!r}; expected a run of the method {kind!r}")
    for each in dict.fromkeys((run, *others, *sources.values())):
        each.check_rows()
    return {each.config.folder: _referred(each, sources) for each in (run, *others)}


def _referred(run: Run, sources: Mapping[str, Run]) -> dict[str, Any]:
    """Return a run's summary with its references filled in; a run is no reference to itself."""
    found = {
        kind: _reference(run, sources[kind], kind)
        for kind in ("individual", "joint")
        if kind in sources and run.config.science.method.name != kind
    }
    result = summary(run, **found)
    names = {kind: sources[kind].config.run.name if kind in found else None for kind in ("individual", "joint")}
    result["references"] = names
    return result


def _begun_baselines(config: RunConfig) -> list[RunConfig]:
    return [each for name in config.baselines if ((each := config.baseline(name)).folder / "run.json").exists()]


def _reference(run: Run, other: Run, kind: str) -> list[float | None]:
    """Return the reference score of each task: of a model of its own, or of the joint model."""
    cells = summary(other)["matrix"]["accuracy"]
    place = {task.id: number for number, task in enumerate(other.tasks.tasks)}
    scores: list[float | None] = []
    for number, task in enumerate(run.tasks.tasks):
        there = place.get(task.id)
        if there is None:
            scores.append(None)
            continue
        if run.data(number).digests != other.data(there).digests:
            raise DataError(
                f"{kind}={other.config.run.name}: task {task.id} has other rows there; the scores do not compare"
            )
        scores.append(cells[there if kind == "individual" else -1][there])
    return scores


def report(config: RunConfig, summaries: Mapping[Path, dict[str, Any]]) -> Path:
    """Write the summaries of runs, and the page of the first of them; return the page's path.

    Raises:
        StorageError: If they cannot be written.
    """
    for folder, found in summaries.items():
        with written(folder):
            if (folder / "metrics").is_dir():
                write_json(folder / "metrics" / "summary.json", found)
    with written(config.folder):
        return write_report(list(summaries.values()), config.folder / "report")
