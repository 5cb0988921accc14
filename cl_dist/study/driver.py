"""Driver of a study: computes its runs, one after another or several at a time, and shares equal stages.

A stage of a run whose fingerprint another run of the study has finished is not computed: its files become hard links to
that run's. Runs that are computed at the same time have no unfinished stage in common, so none is computed twice.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_dist import session
from cl_dist.errors import CheckpointError, ClDistError, ClusterError, ConfigError, RunInUseError
from cl_dist.ledger import link, write_json, write_text
from cl_dist.run import Run
from cl_dist.run_events import Watcher, read_state
from cl_dist.sequence import remaining
from cl_dist.stage import Stage, StageRef, ref
from cl_dist.storage import run_lock, written
from cl_dist.strict_yaml import yaml_text
from cl_dist.study import registration
from cl_dist.study.file import COPY, Study, StudyRun
from cl_dist.study.results import study_document

log = logging.getLogger(__name__)
DOCUMENT = "study.json"
Note = Callable[[str], None]
LOCK_WAIT_S = 90.0
"""Time to wait for a run that workers of a killed driver are still saving."""


class StudyRunError(ClDistError):
    """A run of a study failed in a worker process; it has the exit code of the run's error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """What is left to compute of an arm."""

    arm: str
    runs: int
    finished: int
    stages: int
    done: int
    shared: int
    """Unfinished stages that another run of the study computes, or has computed."""
    hours: float | None
    """Estimate from the seconds of the arm's finished stages of the same name; None where there is none."""


class OpenStudy:
    """A study with its runs open."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.runs: dict[str, Run] = {each.name: Run(each.config) for each in study.runs}
        self.stages: dict[str, list[tuple[Stage, str]]] = {}
        """Stages of each run with their fingerprints."""
        self._sources: dict[str, list[tuple[Run, StageRef]]] = {}
        for name, run in self.runs.items():
            self.stages[name] = [(stage, run.ledger.fingerprint(stage)) for stage in run.stages()]
            for stage, fingerprint in self.stages[name]:
                self._sources.setdefault(fingerprint, []).append((run, ref(stage)))

    def check(self) -> None:
        """Check that finished stages fit the study file.

        Raises:
            CheckpointError: If one was computed with other settings, or the tasks of a run have moved.
        """
        for name, run in self.runs.items():
            try:
                run.ledger.check_order()
                remaining(run)
            except CheckpointError as error:
                raise CheckpointError(
                    f"run {name}: {error} For a study with other arms or orders set name=... to start a new one."
                ) from None

    def missing(self, name: str) -> list[str]:
        """Return the fingerprints of the stages that a run has not finished."""
        ledger = self.runs[name].ledger
        return [fingerprint for stage, fingerprint in self.stages[name] if ledger.manifest(ref(stage)) is None]

    def done(self) -> list[StudyRun]:
        """Return the finished runs."""
        return [each for each in self.study.runs if not self.missing(each.name)]

    def share(self, name: str) -> int:
        """Link the stages that a run lacks and another run has finished; return their number."""
        run, count = self.runs[name], 0
        for stage, fingerprint in self.stages[name]:
            if run.ledger.manifest(ref(stage)) is None:
                finished = (
                    other.ledger.path(found)
                    for other, found in self._sources[fingerprint]
                    if other is not run and other.ledger.manifest(found) is not None
                )
                count += any(run.ledger.adopt(stage, folder) for folder in finished)
        return count

    def share_rows(self, name: str) -> None:
        """Link the rows that other runs have published."""
        own = self.runs[name].config.folder / "rows"
        for other in self.runs.values():
            for folder in (other.config.folder / "rows").glob("[!.]*"):
                if not (own / folder.name).exists():
                    made = own / f".{folder.name}.{os.getpid()}"
                    for path in folder.iterdir():
                        link(path, made / path.name)
                    made.rename(own / folder.name)

    def num_stages(self) -> dict[str, int]:
        """Return the number of stages of all runs, and of the stages to compute."""
        return {"of_runs": sum(map(len, self.stages.values())), "distinct": len(self._sources)}

    def plan(self) -> list[ArmPlan]:
        """Return what is left to compute, by arm; a shared stage counts for the first run that needs it."""
        seconds = self._seconds()
        taken: set[str] = set()
        plans = {arm: ArmPlan(arm, 0, 0, 0, 0, 0, 0.0) for arm in self.study.file.arms}
        computed = {
            fingerprint
            for fingerprint, sources in self._sources.items()
            if any(run.ledger.manifest(stage) is not None for run, stage in sources)
        }
        for each in self.study.runs:
            run, known = self.runs[each.name], plans[each.arm]
            stages = self.stages[each.name]
            todo = [(stage, key) for stage, key in stages if run.ledger.manifest(ref(stage)) is None]
            hours, shared = known.hours, known.shared
            for stage, fingerprint in todo:
                if fingerprint in computed or fingerprint in taken:
                    shared += 1
                    continue
                taken.add(fingerprint)
                cost = seconds.get((each.arm, stage.name))
                hours = None if hours is None or cost is None else hours + cost / 3600
            plans[each.arm] = ArmPlan(
                each.arm,
                known.runs + 1,
                known.finished + (not todo),
                known.stages + len(stages),
                known.done + len(stages) - len(todo),
                shared,
                hours,
            )
        return list(plans.values())

    def _seconds(self) -> dict[tuple[str, str], float]:
        """Return the mean seconds of finished stages, by arm and name."""
        found: dict[tuple[str, str], list[float]] = {}
        for each in self.study.runs:
            run = self.runs[each.name]
            for stage, _ in self.stages[each.name]:
                manifest = run.ledger.manifest(ref(stage))
                if manifest is not None:
                    found.setdefault((each.arm, stage.name), []).append(manifest["seconds"])
        return {key: sum(values) / len(values) for key, values in found.items()}


def run_study(
    study: Study,
    *,
    parallel: int = 1,
    compute: bool = True,
    watch: Callable[[], Watcher] | None = None,
    note: Note = log.info,
    report: Callable[[Any, Path], object] | None = None,
    command: str = "cl_dist.study",
) -> Any:
    """Compute the runs of a study that are missing, write study.json and return its content.

    Stages that are finished are not computed again, so the same call continues a study that was stopped or killed.

    Args:
        study: The study.
        parallel: Number of runs at a time, each in a process of its own if it is above 1.
        compute: False writes the results of the runs that are finished, and computes nothing.
        watch: Makes a watcher for each run; see `session.train`. Not used with several runs at a time.
        note: Called with a line when a run begins or ends.
        report: Called with the content of study.json and the study folder, after each run: it writes the page.
        command: The text that run.json notes as the command.

    Raises:
        ClDistError: As for `session.train`. Finished runs keep their results.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel {parallel}: expected 1 or more")
    opened = OpenStudy(study)
    with run_lock(study.folder):
        opened.check()
        found = registration.registered(study, _num_finished(study.folder))
        with written(study.folder):
            registration.write(study.folder, found)
            write_text(study.folder / COPY, yaml_text(study.tree))

        def conclude() -> Any:
            document = study_document(study, opened.runs, opened.done(), found, opened.num_stages())
            with written(study.folder):
                write_json(study.folder / DOCUMENT, document)
                if report is not None:
                    report(document, study.folder)
            return document

        if compute:
            missing = [each for each in study.runs if not _is_finished(opened, each)]
            if parallel == 1:
                _one_at_a_time(opened, missing, watch, note, conclude, command)
            else:
                _several(opened, missing, parallel, note, conclude, command)
        return conclude()


def _num_finished(folder: Path) -> int:
    """Return the number of finished runs in a study folder, also of arms, orders and seeds that the file had before."""
    states = (read_state(path.parent) for path in (folder / "runs").glob("*/run.json"))
    return sum(state.get("status") == "finished" for state in states)


def _is_finished(opened: OpenStudy, run: StudyRun) -> bool:
    return not opened.missing(run.name) and read_state(run.config.folder).get("status") == "finished"


def _one_at_a_time(
    opened: OpenStudy,
    missing: Sequence[StudyRun],
    watch: Callable[[], Watcher] | None,
    note: Note,
    conclude: Callable[[], Any],
    command: str,
) -> None:
    for number, each in enumerate(missing, 1):
        with _unlocked(each):
            shared = opened.share(each.name)
            opened.share_rows(each.name)
        note(f"run {each.name} ({number} of {len(missing)}){_shared(shared)}")
        session.train(each.config, baselines=False, watch=watch and watch(), command=command)
        conclude()


def _shared(count: int) -> str:
    return f": {count} stages shared with other runs" if count else ""


@contextmanager
def _unlocked(run: StudyRun) -> Iterator[None]:
    """Lock the folder of a run, after waiting for workers of a killed driver that still save it.

    Raises:
        RunInUseError: If it is still locked after LOCK_WAIT_S.
    """
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            with run_lock(run.config.folder):
                yield
            return
        except RunInUseError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


@dataclass
class _Queue:
    """Runs that wait for a worker process, and runs in progress."""

    opened: OpenStudy
    waiting: list[StudyRun]
    busy: dict[str, list[str]] = field(default_factory=dict)
    """Fingerprints that each run at work had not finished when it began."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: BaseException | None = None

    def take(self) -> StudyRun | None:
        """Return a run that shares no unfinished stage with one at work, waiting for it; None at the end."""
        with self.changed:
            while self.waiting and self.error is None:
                at_work = {
                    fingerprint
                    for name, missing in self.busy.items()
                    for fingerprint in set(missing) & set(self.opened.missing(name))
                }
                for run in self.waiting:
                    missing = self.opened.missing(run.name)
                    if not at_work & set(missing):
                        self.waiting.remove(run)
                        self.busy[run.name] = missing
                        return run
                self.changed.wait(1.0)
            return None

    def put_back(self, run: StudyRun) -> bool:
        """Put a run back into the queue if another one is in progress; return False otherwise."""
        with self.changed:
            if len(self.busy) < 2:
                return False
            self.busy.pop(run.name)
            self.waiting.insert(0, run)
            self.changed.notify_all()
            return True

    def give(self, run: StudyRun, error: BaseException | None) -> None:
        """Note that a run has ended."""
        with self.changed:
            self.busy.pop(run.name, None)
            self.error = self.error or error
            self.changed.notify_all()


def _several(
    opened: OpenStudy,
    missing: Sequence[StudyRun],
    parallel: int,
    note: Note,
    conclude: Callable[[], Any],
    command: str,
) -> None:
    """Compute runs in worker processes, which end when this process does."""
    queue = _Queue(opened, list(missing))
    logs = opened.study.folder / "logs"
    logs.mkdir(exist_ok=True)
    workers = [_Worker(logs / f"worker-{number}.log") for number in range(1, min(parallel, len(missing)) + 1)]
    threads = [
        threading.Thread(target=_work, args=(queue, worker, note, conclude, command), daemon=True) for worker in workers
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # join would delay signals
                thread.join(0.2)
    finally:
        with queue.changed:
            queue.waiting.clear()
        for worker in workers:
            worker.stop()
    if queue.error is not None:
        raise queue.error


def _work(queue: _Queue, worker: "_Worker", note: Note, conclude: Callable[[], Any], command: str) -> None:
    while (run := queue.take()) is not None:
        try:
            with _unlocked(run), queue.changed:
                shared = queue.opened.share(run.name)
                queue.opened.share_rows(run.name)
            note(f"run {run.name}{_shared(shared)}")
            worker.compute(run, command)
            note(f"run {run.name} is finished")
            with queue.changed:
                conclude()
            queue.give(run, None)
        except BaseException as error:
            if getattr(error, "exit_code", None) == ClusterError.exit_code and queue.put_back(run):
                note(f"run {run.name} waits: the cluster has no room for it; one run fewer at a time from now on")
            else:
                queue.give(run, error)
            return


class _Worker:
    """A process that computes runs; it stops when its stdin closes."""

    def __init__(self, log_file: Path) -> None:
        with log_file.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cl_dist.study.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # a terminal's Ctrl-C reaches the driver alone, which stops its workers
            )
        self._log = log_file

    def compute(self, run: StudyRun, command: str) -> None:
        """Compute a run.

        Raises:
            StudyRunError: If it fails.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"config": run.config.tree(), "command": command}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            reply: Mapping[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise StudyRunError(f"run {run.name}: its process ended; see {self._log}", 5) from None
        if "message" in reply:
            raise StudyRunError(f"run {run.name}: {reply['kind']}: {reply['message']}", reply["code"])

    def stop(self) -> None:
        """Stop the process; a run at work saves its state first."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
