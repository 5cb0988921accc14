"""Train and resume runs: the functions behind `from cl_dist import train, resume` and the command line's verbs."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cl_dist import sequence
from cl_dist.checks import check_data, check_tokens, check_writing, step_hints
from cl_dist.config import apply_overrides
from cl_dist.errors import ClDistError, StoppedError
from cl_dist.logs import driver_log, log_event
from cl_dist.mirror import Mirror, Mirroring
from cl_dist.pace import Pace
from cl_dist.run import Run
from cl_dist.run_config import RunConfig, parse_run, read_run_file
from cl_dist.run_events import Tracker, Watcher, now, read_state, remember_baselines
from cl_dist.run_folder import reopen, save
from cl_dist.session_events import opening, phase, plan, planned
from cl_dist.sinks import Trackers
from cl_dist.small_runs import smoke as smoke_run
from cl_dist.small_runs import without_ray
from cl_dist.stage import flat
from cl_dist.storage import run_lock
from cl_dist.stored_run import StoredRun

log = logging.getLogger(__name__)


def train(
    source: RunConfig | Mapping[str, Any] | Path | str,
    *,
    overrides: Sequence[str] = (),
    baselines: bool = True,
    local: bool = False,
    smoke: bool = False,
    watch: Watcher | None = None,
    report: Callable[[StoredRun], object] = StoredRun.write_summaries,
    command: str = "cl_dist.train",
) -> StoredRun:
    """Train a task sequence; stages that the run folder already has are not computed again.

    Args:
        source: The path of a run file, its content as plain data, or a RunConfig.
        overrides: Settings that replace those of the source, as on the command line: "science.train.epochs=3".
        baselines: Also run the baselines that the run file names.
        local: Run in this process with one worker, without Ray.
        smoke: Run at most 30 rows of each split for one epoch, under the name NAME-smoke.
        watch: Called with every event; a context manager is entered until the last stage ends. None logs the events.
        report: Called with the finished run. The command line passes a function that also writes the HTML page.
        command: The text that run.json notes as the command.

    Raises:
        ClDistError: ConfigError, DataError, ClusterError, TrainingError and so on; see `cl_dist.errors`.
    """
    file: Path | None = None
    if isinstance(source, RunConfig):
        config = parse_run(apply_overrides(source.tree(), overrides)) if overrides else source
    elif isinstance(source, Mapping):
        config = parse_run(apply_overrides(source, overrides))
    else:
        file = Path(source)
        config = read_run_file(file, overrides)
    config = smoke_run(config) if smoke else config
    config = without_ray(config) if local else config
    return _execute(config, file, baselines, watch, report, command)


def resume(
    folder: Path | str,
    *,
    overrides: Sequence[str] = (),
    add_tasks: Path | str | None = None,
    baselines: bool | None = None,
    local: bool = False,
    watch: Watcher | None = None,
    report: Callable[[StoredRun], object] = StoredRun.write_summaries,
    command: str = "cl_dist.resume",
) -> StoredRun:
    """Continue a run at its first unfinished stage, or at the last checkpoint of that stage.

    Args:
        folder: The run folder.
        overrides: Settings that replace those of the run; `cluster` settings may change at any time.
        add_tasks: A YAML file of tasks to append: `tasks: [...]`.
        baselines: Also run the baselines; None does what the last `train` or `resume` of the run did.
        local: Go on in this process with one worker, without Ray; also for later calls of `resume`.
        watch: See `train`.
        report: See `train`.
        command: See `train`.

    Raises:
        ClDistError: As for `train`.
    """
    config = reopen(Path(folder), overrides, None if add_tasks is None else Path(add_tasks))
    config = without_ray(config) if local else config
    if baselines is None:
        baselines = read_state(config.folder).get("baselines") is not False
    return _execute(config, None, baselines, watch, report, command)


def _execute(
    config: RunConfig,
    source: Path | None,
    baselines: bool,
    watch: Watcher | None,
    report: Callable[[StoredRun], object],
    command: str,
) -> StoredRun:
    """Compute the missing stages of a run and its baselines.

    All settings and rows are checked before anything is written or started. If no stage is missing, nothing starts.
    """
    watch = watch or log_event
    with watch if isinstance(watch, AbstractContextManager) else nullcontext():
        stored = _stored(config, source, baselines, watch, command)
    report(stored)
    return stored


def _stored(config: RunConfig, source: Path | None, baselines: bool, watch: Watcher, command: str) -> StoredRun:
    configs = [config, *(config.baseline(name) for name in config.baselines if baselines)]
    watch(opening(configs))
    watch(phase("reading data"))
    _fetch_mirrors(configs)
    runs = [Run(each) for each in configs]
    check_data(runs[0])
    for run in runs:
        run.ledger.check_order()
    missing = [bool(sequence.remaining(run)) for run in runs]  # refuses conflicts before anything is written
    for run, is_missing in zip(runs, missing, strict=True):
        if is_missing:
            watch(phase("loading torch and the tokenizer"))
            check_tokens(run)
            check_writing(run)
            for hint in step_hints(run):
                log.warning("steps run=%s %s", run.config.run.name, hint)
    with _locked(configs):
        for each in configs:
            save(each, source if each is config else None)
        summaries = _compute(runs, missing, watch, command, baselines)
    return StoredRun(runs[0], runs[1:], summaries)


def _compute(
    runs: Sequence[Run], missing: Sequence[bool], watch: Watcher, command: str, baselines: bool
) -> dict[Path, Mapping[str, Any]]:
    """Compute the missing stages of some runs, the main run first; return the summaries that this has computed."""
    main, dispatcher, pace = runs[0].config, None, None
    summaries: dict[Path, Mapping[str, Any]] = {}
    with driver_log(main.folder):
        try:
            remember_baselines(main.folder, baselines)
            if any(missing):
                stages = {str(run.config.folder): planned(run) for run in runs}
                pace = Pace(stages)
                watch(plan(runs, stages))
                watch(phase("starting Ray" if main.cluster.dispatcher == "ray" else "loading torch"))
                dispatcher = _dispatcher(main)
                if (address := getattr(dispatcher, "dashboard", None)) is not None:
                    watch({"ts": now(), "event": "cluster", "dashboard": address})
            for run, is_missing in zip(runs, missing, strict=True):
                tracker = Tracker(run, command, _watchers(run.config, watch), pace, baselines)
                if is_missing:
                    _run(run, dispatcher, tracker)
                elif read_state(run.config.folder).get("status") != "finished":
                    tracker.begin([], set())  # killed between the last stage and the end
                    tracker.finish()
                elif run.config.run.mirror is not None:
                    Mirror(run.config).push()  # the last one may have been killed while it copied
                if tracker.found is not None:
                    summaries[run.config.folder] = tracker.found
        finally:
            if dispatcher is not None:
                dispatcher.close()
    return summaries


@contextmanager
def _locked(configs: Sequence[RunConfig]) -> Iterator[None]:
    """Lock the folders of a run and of its baselines, which can be resumed on their own."""
    with ExitStack() as locks:
        for config in configs:
            locks.enter_context(run_lock(config.folder))
        yield


def _watchers(config: RunConfig, watch: Watcher) -> Watcher:
    """Return a watcher that passes events to `watch`, to the run file's trackers and to its mirror."""
    watchers = [watch]
    if config.run.trackers:
        settings = flat(config.tree()["science"])
        watchers.append(Trackers(config.run.trackers, config.folder, config.run.name, settings))
    if config.run.mirror is not None:
        watchers.append(Mirroring(Mirror(config)))

    def pass_on(event: Mapping[str, Any]) -> None:
        for each in watchers:
            each(event)

    return pass_on


def _fetch_mirrors(configs: Sequence[RunConfig]) -> None:
    """Fetch the stages that the mirrors of runs have and their folders lack."""
    mirrored = [config for config in configs if config.run.mirror is not None]
    if mirrored:
        with _locked(mirrored):
            for config in mirrored:
                Mirror(config).pull()


def _run(run: Run, dispatcher: Any, tracker: Tracker) -> None:
    try:
        sequence.run_stages(run, dispatcher, tracker)
    except (KeyboardInterrupt, StoppedError) as error:
        _end(tracker, "stopped" if isinstance(error, StoppedError) else "interrupted")
        raise
    except BaseException as error:
        if isinstance(error.__cause__, StoppedError):  # raised inside Ray's compiled code, which wraps it
            _end(tracker, "stopped")
            raise error.__cause__ from None
        _end(tracker, "failed")
        raise


def _end(tracker: Tracker, status: str) -> None:
    """Note how a run ended; an error here, such as a full disk, does not replace the error that ended the run."""
    try:
        tracker.finish(status)
    except (OSError, ClDistError) as error:
        log.warning("run.json cannot note that the run has %s: %s", status, error)


def _dispatcher(config: RunConfig) -> Any:
    """Return the dispatcher that the run file names; imported here, since both import torch or Ray."""
    if config.cluster.dispatcher == "local":
        from cl_dist.dispatch_local import LocalDispatcher

        return LocalDispatcher(threads=max(1, int(config.cluster.cpus_per_worker)))
    from cl_dist.dispatch_ray.dispatcher import RayDispatcher

    return RayDispatcher(config.cluster, config.folder)
