"""Status, events, accuracy matrix R and summary of a run, written by the driver; reports read the summary."""

import csv
import io
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cl_dist.data.rows import SPLITS
from cl_dist.errors import CheckpointError
from cl_dist.kinds import Reader, kind_of
from cl_dist.ledger import write_json, write_text
from cl_dist.metrics import summarize
from cl_dist.pace import Pace
from cl_dist.run import Run
from cl_dist.run_intervals import run_intervals, with_intervals
from cl_dist.stage import Evaluate, Stage, StageRef, ref

log = logging.getLogger(__name__)
LIBRARIES = ("cl-dist", "torch", "deepspeed", "accelerate", "transformers", "datasets", "ray", "peft")
STATE = {"status": str, "command": str, "versions": dict, "attempts": list}
ATTEMPT = {"pid": int, "host": str}
"""Fields that are read from run.json and from its attempts."""
NOT_STORED = ("step", "phase")
"""Events for the progress bar: one per optimizer step or shard, and what a worker does before its first one."""
Matrix = list[list[float | None]]
Watcher = Callable[[Mapping[str, Any]], None]


class Tracker:
    """Writes run.json, metrics/ and events during a run; a watcher receives the same events, for a terminal."""

    def __init__(
        self,
        run: Run,
        command: str = "",
        watch: Watcher = lambda event: None,
        pace: Pace | None = None,
        baselines: bool = True,
    ) -> None:
        self._run, self._command, self._watch, self._pace = run, command, watch, pace
        self._baselines = baselines
        self._folder = run.config.folder
        self._stage: Stage | None = None
        self._state: dict[str, Any] = {}
        self._began = time.monotonic()
        self.found: dict[str, Any] | None = None
        """The summary as of the last finished stage; None before it has been computed."""

    def begin(self, stages: Sequence[Stage], done: set[StageRef]) -> None:
        """Record the start of an attempt and the stages already done."""
        (self._folder / "metrics").mkdir(parents=True, exist_ok=True)
        state = read_state(self._folder)
        attempt = {"started": now(), "pid": os.getpid(), "host": platform.node(), "stages_done": len(done)}
        self._state = {
            "schema_version": 1,
            "run": self._run.config.run.name,
            "status": "running",
            "command": state.get("command") or self._command,
            "versions": versions(),
            "git": _git(),
            "attempts": [*state.get("attempts", []), attempt],
        }
        if not self._baselines:
            self._state["baselines"] = False  # `resume` leaves them out too
        write_json(self._folder / "run.json", self._state)
        self.event({"event": "begin", "run": self._run.config.run.name, "stages": len(stages), "done": len(done)})

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Emit the start and end events of a stage."""
        self._stage = stage
        self.event({"event": "stage_start", "fingerprint": self._run.ledger.fingerprint(stage)})
        began = time.monotonic()
        yield
        self.event({"event": "stage_end", "seconds": round(time.monotonic() - began, 3)})

    def event(self, event: Mapping[str, Any]) -> None:
        """Append an event of the current stage to metrics/events.jsonl and pass it to the watcher."""
        line: dict[str, Any] = {"ts": now()}
        if self._stage is not None:
            line |= {
                "stage": self._run.ledger.key(ref(self._stage)),
                "task": self._stage.task,
                "kind": self._stage.kind,
            }
        line |= event
        due = None if self._pace is None else self._pace.take(str(self._folder), line)
        if event["event"] in NOT_STORED:
            line |= {} if self._pace is None else self._pace.estimates()
        else:
            _append(self._folder / "metrics" / "events.jsonl", json.dumps(line))
        self._watch(line)
        if due is not None:
            self.event({**due, "run": self._run.config.run.name})

    def stage_done(self, stage: Stage) -> None:
        """Record that a stage is finished; if it has new scores, update the matrix and the summary."""
        self.found = None
        event: dict[str, Any] = {"event": "stage_done", "metrics": stage_metrics(self._run, stage)}
        if isinstance(stage, Evaluate):
            found = self.write_summary()
            row = found["matrix"]["accuracy"][stage.task]
            event |= {"accuracy": {self._run.tasks.tasks[u].id: row[u] for u in range(stage.task + 1)}}
            event["metrics"] |= {f"acc/R/{t}": value for t, value in event["accuracy"].items() if value is not None}
        self.event(event)
        self._stage = None

    def write_summary(self) -> dict[str, Any]:
        """Write R.csv and summary.json, and return the summary."""
        self.found = (summary(self._run) if self.found is None else self.found) | {"status": self._state["status"]}
        write_matrix(self._folder / "metrics" / "R.csv", self._run, self.found["matrix"]["accuracy"])
        write_json(self._folder / "metrics" / "summary.json", self.found)
        return self.found

    def finish(self, status: str = "finished") -> None:
        """Record how the attempt ended, if it has begun."""
        if not self._state:
            return
        self._state["status"] = status
        self._state["attempts"][-1] |= {"ended": now(), "seconds": round(time.monotonic() - self._began, 3)}
        if status != "finished":  # the summary may fail too, as on a full disk
            write_json(self._folder / "run.json", self._state)
        # run.json comes after R.csv and the summary: a resume repeats all of this unless run.json says finished. The
        # event comes last because it makes the mirror copy all three.
        metrics = {name: found["value"] for name, found in self.write_summary()["metrics"].items()}
        numbers = {name: value for name, value in metrics.items() if value is not None}
        write_json(self._folder / "run.json", self._state)
        self.event({"event": status, "tasks": len(self._run.tasks), "metrics": numbers})


def _append(path: Path, line: str) -> None:
    """Append a line to a file, after terminating a last line that a kill has truncated."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def remember_baselines(folder: Path, chosen: bool) -> None:
    """Note in run.json of a run that has begun whether its baselines run along, for `resume`."""
    state = read_state(folder)
    if state and (state.get("baselines") is not False) is not chosen:
        write_json(folder / "run.json", state | {"baselines": chosen})


def read_state(folder: Path) -> dict[str, Any]:
    """Return run.json of a run folder; empty if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf8"))
        if not _has(state, STATE) or not all(_has(attempt, ATTEMPT) for attempt in state["attempts"]):
            raise ValueError(f"expected {', '.join(STATE)}, each attempt with {' and '.join(ATTEMPT)}")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'run.json'}: damaged: {error}; remove it, since stages do not depend on it"
        ) from None
    return state


def last_progress(folder: Path, stage: str, is_running: bool) -> dict[str, Any]:
    """Return step, total_steps, loss and left_s of a stage without a result, as far as the run folder has them.

    Of a stage that is not running, the step is that of its newest checkpoint.
    """
    found: dict[str, Any] = {}
    for event in _tail(folder / "metrics" / "events.jsonl"):
        if event.get("event") == "begin" or (event.get("event") == "stage_start" and event.get("stage") == stage):
            found.pop("left_s", None)
        if event.get("stage") != stage:
            continue
        found |= {name: event[name] for name in ("step", "total_steps") if isinstance(event.get(name), int)}
        for name in ("loss", "train/loss"):
            if isinstance(event.get(name), float):
                found["loss"] = event[name]
        if event.get("event") == "progress" and isinstance(event.get("left_s"), int):
            age = (datetime.now(UTC) - datetime.fromisoformat(str(event["ts"]))).total_seconds()
            found["left_s"] = max(0, round(event["left_s"] - age))
    if not is_running:
        steps = [int(path.parent.name.removeprefix("step-")) for path in _checkpoints(folder, stage)]
        found = {name: found[name] for name in ("total_steps", "loss") if steps and name in found}
        found |= {"step": max(steps)} if steps else {}
    return found


def _checkpoints(folder: Path, stage: str) -> list[Path]:
    task, _, name = stage.partition("/")
    return list((folder / "stages" / task).glob(f"{name}.partial-*/checkpoints/step-*[0-9]/checkpoint.json"))


def _tail(path: Path, size: int = 2**18) -> Iterator[dict[str, Any]]:
    """Yield the last events of a file, without lines that are damaged."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        with suppress(ValueError, RecursionError):  # the first is cut, a kill may have cut another
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _has(data: Any, types: Mapping[str, type]) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(key), kind) for key, kind in types.items())


def matrix(run: Run, score: str) -> Matrix:
    """Return R: the score after task t (row) on task u (column); None if it was not measured."""
    rows: Matrix = []
    for t in range(len(run.tasks)):
        row: list[float | None] = [None] * len(run.tasks)
        for stage in run.plan(t):
            if isinstance(stage, Evaluate) and run.ledger.manifest(ref(stage)) is not None:
                if stage.previous is not None:
                    row = list(rows[stage.previous.task])
                for task, numbers in run.ledger.read(ref(stage), "scores.json")["tasks"].items():
                    row[int(task)] = numbers[score]
        rows.append(row)
    return rows


def write_matrix(path: Path, run: Run, cells: Matrix) -> None:
    """Write a matrix as CSV, one row per learned task; cells that were not measured are empty."""
    names = [task.id for task in run.tasks.tasks]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["after", *names])
    writer.writerows(
        [name, *("" if cell is None else repr(cell) for cell in row)] for name, row in zip(names, cells, strict=True)
    )
    write_text(path, text.getvalue())


def summary(run: Run) -> dict[str, Any]:
    """Return a run's results as plain data; `with_references` adds metrics that compare it with other runs."""
    config, state = run.config, read_state(run.config.folder)
    accuracy, f1 = matrix(run, "score"), matrix(run, "f1_macro")
    intervals = run_intervals(run)
    result: dict[str, Any] = {
        "schema_version": 1,
        "run": config.run.name,
        "status": state.get("status", "running"),
        "command": state.get("command", ""),
        "versions": state.get("versions", {}),
        "method": config.science.method.name,
        "seed": config.science.seed,
        "model": config.science.model.source,
        "cluster": config.cluster.model_dump(mode="json", include={"dispatcher", "engine", "workers", "zero_stage"}),
        "tasks": [_task_summary(run, t) for t in range(len(run.tasks))],
        "matrix": {"accuracy": accuracy, "f1_macro": f1},
        "intervals": {"level": intervals["level"], "accuracy": intervals["accuracy"]},
        "metrics": with_intervals(summarize(_floats(accuracy), _floats(f1)), intervals["metrics"]),
        "references": {"individual": None, "joint": None},
        "stages": _stage_summaries(run),
    }
    if plugins := _plugin_summary(run):
        result["plugins"] = plugins
    return result | _sections(run)


def with_references(
    found: Mapping[str, Any],
    individual: Sequence[float | None] | None = None,
    joint: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Return a summary with the metrics that compare it with reference scores.

    Args:
        found: The summary of a run.
        individual: Per task, the score of a model trained on that task alone.
        joint: Per task, the score of one model trained on all tasks at once.
    """
    accuracy, f1 = _floats(found["matrix"]["accuracy"]), _floats(found["matrix"]["f1_macro"])
    metrics = summarize(accuracy, f1, individual=_row(individual), joint=_row(joint))
    intervals = {name: metric.get("interval") for name, metric in found["metrics"].items()}
    return {**found, "metrics": with_intervals(metrics, intervals)}


def _task_summary(run: Run, t: int) -> dict[str, Any]:
    from cl_dist.metrics import majority_accuracy

    data = run.data(t)
    return {
        "id": data.id,
        "labels": list(data.labels),
        "rows": {split: len(data.rows(split)) for split in SPLITS},
        "majority": majority_accuracy([row.label for row in data.train], [row.label for row in data.test]),
        "overlap": data.overlap,
        "warnings": list(data.warnings),
    }


def _stage_summaries(run: Run) -> list[dict[str, Any]]:
    stages = []
    for stage in run.stages():
        manifest = run.ledger.manifest(ref(stage))
        if manifest is not None:
            stages.append(
                {
                    "key": run.ledger.key(ref(stage)),
                    "task": stage.task,
                    "kind": stage.kind,
                    "seconds": manifest["seconds"],
                    "started": manifest["started"],
                    "workers": run.config.cluster.workers,
                    "metrics": stage_metrics(run, stage),
                }
            )
    return stages


def stage_metrics(run: Run, stage: Stage) -> dict[str, float]:
    """Return the metrics of a finished stage for trackers and the summary."""
    return kind_of(stage).metrics(_reader(run, stage))


def _reader(run: Run, stage: Stage) -> Reader:
    return lambda name: run.ledger.read(ref(stage), name)


def _sections(run: Run) -> dict[str, Any]:
    """Return the results of stages by section of the summary: replayed samples, votes."""
    sections: dict[str, Any] = {}
    for stage in run.stages():
        kind = kind_of(stage)
        if kind.section is not None and run.ledger.manifest(ref(stage)) is not None:
            sections.setdefault(kind.section, []).extend(kind.found(run, stage, _reader(run, stage)))
    return sections


WITHOUT = {
    "sharing": "accuracy_without_ksm",
    "earlier": "accuracy_without_earlier",
    "gates": "accuracy_with_coin_gates",
}
"""Part that an Evaluate stage switches off -> its name in the summary."""


def _plugin_summary(run: Run) -> dict[str, Any]:
    """Return statistics of the masks and routers of finished tasks; empty for methods without them."""
    plugins: dict[str, Any] = {}
    for t in range(len(run.tasks)):
        train, score = (StageRef(task=t, stage=name) for name in ("train", "evaluate"))
        learner = {} if run.ledger.manifest(train) is None else run.ledger.read(train, "train.json")["learner"]
        if "mask_use" not in learner:
            continue
        plugins["layers"] = learner["layers"]
        plugins["units"] = [{"hidden": hidden, "output": output} for hidden, output in learner["units"]]
        for name in ("mask_use", "mask_shared", "free_units"):
            plugins.setdefault(name, []).append(learner[name])
        if run.ledger.manifest(score) is not None:
            scores = run.ledger.read(score, "scores.json")
            opened = scores["tasks"][str(t)]["observed"].get("gate_open", [])
            plugins.setdefault("gate_open", []).append(opened or None)
            for part, name in WITHOUT.items():
                plugins.setdefault(name, []).append(scores["without"].get(part, {}).get("accuracy"))
    return plugins


def _floats(cells: Matrix) -> list[list[float]]:
    return [[float("nan") if cell is None else cell for cell in row] for row in cells]


def _row(cells: Sequence[float | None] | None) -> list[float] | None:
    return None if cells is None else _floats([list(cells)])[0]


def now() -> str:
    """Return the time of an event: UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that results depend on; None for those not installed."""
    return {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


def _git() -> str | None:
    """Return the git commit of the working directory."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
