"""Sinks that send a run's metrics to TensorBoard, MLflow and Weights & Biases; on the driver, torch-free.

Telemetry (train/...) and the means of a round (round/..., dev/...) are logged at the global optimizer step, which
counts over all tasks; metrics of a finished stage at its task. The run folder stores the tracker's run id, so
all attempts at a run are one run in the tracker. Steps that a resumed attempt repeats are not logged
again.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from cl_dist.errors import ConfigError
from cl_dist.ledger import write_json

Name = Literal["tensorboard", "mlflow", "wandb"]
STATE, EVENTS = "metrics/trackers.json", "metrics/events.jsonl"
AT_STEPS = ("telemetry", "round")
"""Events with metrics at an optimizer step."""
TRACKED = ("stage_start", *AT_STEPS)
ENDINGS = {"finished": "FINISHED", "failed": "FAILED"}
"""Run status in MLflow; a stopped or interrupted run is KILLED until it resumes."""


class Sink(Protocol):
    """One tracker."""

    def log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        """Log metrics at a step; axis is the unit that it counts: "step" (of the optimizer) or "task"."""

    def close(self, status: str) -> None:
        """Record how this attempt at the run ended."""


class Trackers:
    """Watcher of a run's events that sends their metrics to sinks."""

    def __init__(self, names: Sequence[Name], folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        """Open the sinks; `settings` are those of the run file, for sinks that display them.

        Raises:
            ConfigError: If the package of a sink is not installed.
        """
        self._stages = _read_stages(folder / EVENTS)
        self._sinks = [_opened(name)(folder, run, settings) for name in names]

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Send the metrics of an event to all sinks."""
        kind = event["event"]
        if kind in TRACKED:
            if _update(self._stages, event) and kind in AT_STEPS:
                self._log(_step_metrics(event), self._global_step(event), "step")
        elif kind == "stage_done":
            per_round = ("train/", "dev/")  # already logged with the rounds
            metrics = {n: value for n, value in event["metrics"].items() if not n.startswith(per_round)}
            self._log(metrics, event["task"], "task")
        elif kind in ("finished", "stopped", "interrupted", "failed"):
            self._log(event.get("metrics", {}), event.get("tasks", 1) - 1, "task")
            for sink in self._sinks:
                sink.close(kind)

    def _global_step(self, event: Mapping[str, Any]) -> int:
        """Return the optimizer steps of the stages before, in the order in which they began, and of the event's own."""
        stages = list(self._stages)
        earlier = stages[: stages.index(event["stage"])]
        return sum(self._stages[stage].total for stage in earlier) + int(event["step"])

    def _log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        if numbers:
            for sink in self._sinks:
                sink.log(numbers, step, axis)


@dataclass
class _StageSteps:
    """Logged progress of a stage."""

    fingerprint: str = ""
    total: int = 0
    """Number of its optimizer steps; 0 if it does not train."""
    last: dict[str, int] = field(default_factory=dict)
    """Last logged step, by kind of event."""


def _update(stages: dict[str, _StageSteps], event: Mapping[str, Any]) -> bool:
    """Update the progress of a stage from an event, and return whether its step is later than all of its kind."""
    kind, stage = event["event"], stages.setdefault(event["stage"], _StageSteps())
    if kind == "stage_start":
        if stage.fingerprint != event["fingerprint"]:  # other settings make it another stage
            stage.fingerprint, stage.last = event["fingerprint"], {}
        return True
    step, stage.total = int(event["step"]), int(event["total_steps"])
    is_new = step > stage.last.get(kind, 0)
    if is_new:
        stage.last[kind] = step
    return is_new


def _step_metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an event at a step; the means of a round get the prefix round/."""
    numbers = {name: value for name, value in event.items() if "/" in name}
    if event["event"] == "round":
        return {name.replace("train/", "round/"): value for name, value in numbers.items()}
    return numbers


def _read_stages(path: Path) -> dict[str, _StageSteps]:
    """Return the progress of the stages in earlier attempts, in the order of their start."""
    stages: dict[str, _StageSteps] = {}
    if path.exists():
        for line in path.read_text(encoding="utf8", errors="replace").splitlines():
            if any(f'"{kind}"' in line for kind in TRACKED):
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # a kill may have truncated a line
                    _update(stages, json.loads(line))
    return stages


def _opened(name: Name) -> Callable[[Path, str, Mapping[str, Any]], Sink]:
    try:
        import_module(name)
    except ImportError:
        raise ConfigError(f"run.trackers: {name!r} is not installed; try pip install 'cl-dist[tracking]'") from None
    match name:
        case "tensorboard":
            return TensorBoard
        case "mlflow":
            return Mlflow
        case "wandb":
            return Wandb


def _stored_id(folder: Path, name: str, make: Callable[[], str]) -> str:
    """Return the id of this run in a tracker, created by the first attempt."""
    path = folder / STATE
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    if name not in ids:
        path.parent.mkdir(parents=True, exist_ok=True)
        ids[name] = make()
        write_json(path, ids)
    return ids[name]


class TensorBoard:
    """Event files in <run folder>/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        """See Sink."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self, status: str) -> None:
        """See Sink."""
        self._writer.close()


class Mlflow:
    """A run of the experiment `cl-dist` at MLFLOW_TRACKING_URI, or in the files of <run folder>/mlflow."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store:
            store = (folder.absolute() / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database driver
        self._client: Any = MlflowClient(store)
        self._run = _stored_id(folder, "mlflow", lambda: self._new(run, settings))
        self._client.update_run(self._run, "RUNNING")

    def _new(self, run: str, settings: Mapping[str, Any]) -> str:
        known = self._client.get_experiment_by_name("cl-dist")
        experiment = known.experiment_id if known is not None else self._client.create_experiment("cl-dist")
        made: str = self._client.create_run(experiment, run_name=run).info.run_id
        for name, value in settings.items():
            self._client.log_param(made, name, str(value)[:500])
        return made

    def log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        """See Sink."""
        for name, value in numbers.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, status: str) -> None:
        """See Sink."""
        self._client.set_terminated(self._run, ENDINGS.get(status, "KILLED"))


class Wandb:
    """A run of the project `cl-dist`: offline, in <run folder>/wandb, unless WANDB_MODE is set."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        made = _stored_id(folder, "wandb", lambda: uuid.uuid4().hex[:12])
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project="cl-dist", id=made, name=run, resume="allow", mode=mode, dir=folder, config=dict(settings)
        )
        for axis in ("step", "task"):
            self._run.define_metric(axis)

    def log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        """See Sink."""
        for name in numbers:
            self._run.define_metric(name, step_metric=axis)
        self._run.log({**numbers, axis: step})

    def close(self, status: str) -> None:
        """See Sink."""
        self._run.finish(exit_code=0 if status == "finished" else 1)
