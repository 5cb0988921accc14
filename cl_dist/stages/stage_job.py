"""Jobs for workers: a stage with the settings it uses. Torch-free, since Ray's own processes also load jobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cl_dist.data.published import published
from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import DataError
from cl_dist.methods.base import MethodConfig
from cl_dist.models.config import ModelConfig
from cl_dist.parallel.config import EngineConfig
from cl_dist.stage import EvaluateConfig, Generate, GenerateConfig, Stage, StageRef, Train, TrainConfig

SaveRequest = Literal["", "save", "stop"]
"""Request to a Train stage between two steps: save, or save and stop."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage with everything a worker needs to run it; plain data, sent to workers by any dispatcher."""

    stage: Stage
    method: MethodConfig
    model: ModelConfig
    tasks: tuple[TaskConfig, ...]
    """The tasks up to the stage's own, in learned order."""
    rows: tuple[str, ...]
    """Folders of the published rows of these tasks."""
    digests: tuple[dict[str, str], ...]
    """Digests of the rows by split, as published by the driver."""
    train: TrainConfig
    """Settings of the stage's own task."""
    max_length: tuple[int, ...]
    """Maximum input length of each task, from that task's own settings."""
    evaluate: EvaluateConfig
    generate: GenerateConfig
    folders: Mapping[StageRef, str]
    """Folders of the stage's inputs."""
    engine: EngineConfig
    seed: int
    chain: tuple[str, ...]
    """Folders of the Train stages with the model's weights, oldest first."""
    log_every: int
    """Optimizer steps between two telemetry events; 0 disables them."""
    profiles: str
    """Folder for the traces of `engine.profile`."""

    @property
    def key(self) -> str:
        """Display name of the stage, such as '02-laptop/train'."""
        return f"{self.stage.task:02d}-{self.tasks[self.stage.task].id}/{self.stage.name}"

    def folder(self, ref: StageRef) -> Path:
        """Return the folder of an input of the stage."""
        return Path(self.folders[ref])


def replayed_rows(job: Job) -> int:
    """Return the number of rows of each earlier task that a Train stage replays or a Generate stage generates."""
    stage = job.stage
    assert isinstance(stage, Train | Generate)
    if stage.budget is None:
        return stage.replay_rows if isinstance(stage, Train) else 0
    earlier = stage.sources if isinstance(stage, Generate) else stage.replay
    return stage.budget.per_task(len(task_data(job, stage.task).train), len(earlier))


def row_length(job: Job, task: int) -> int:
    """Return the maximum length of a task's rows in a stage: from the stage's own settings, else from the task's."""
    own = isinstance(job.stage, Train) and job.stage.settings is not None
    return job.train.max_length if own else job.max_length[task]


def task_data(job: Job, task: int) -> TaskData:
    """Return the published rows of a task, mapped once per process.

    Raises:
        DataError: If this machine sees other rows than the driver published.
    """
    loaded = _mapped(job.rows[task])
    if loaded.digests != job.digests[task]:
        raise DataError(
            f"task {loaded.id}: {job.rows[task]} contains other rows than the driver published; resume the run"
        )
    return loaded


@lru_cache(maxsize=128)
def _mapped(folder: str) -> TaskData:
    return published(Path(folder))
