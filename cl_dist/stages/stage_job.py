"""What a worker is given: a stage and the settings it uses. Without torch: Ray's own processes hold jobs too."""

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
"""What a Train stage is asked to do between two steps: save, or save and stop."""


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
    """Digests of the rows by split, as the driver read them."""
    train: TrainConfig
    """Settings of the stage's own task."""
    max_length: tuple[int, ...]
    """Longest input of each task, as its own settings say, whichever task the model has come to."""
    evaluate: EvaluateConfig
    generate: GenerateConfig
    folders: Mapping[StageRef, str]
    """Where the results of the stage's inputs lie."""
    engine: EngineConfig
    seed: int
    chain: tuple[str, ...]
    """Folders of the Train stages whose weights make up the model, oldest first."""
    log_every: int
    """Optimizer steps between two telemetry events; 0 disables them."""
    profiles: str
    """Folder for the traces of `engine.profile`."""

    @property
    def key(self) -> str:
        """Name of the stage as people see it, such as '02-laptop/train'."""
        return f"{self.stage.task:02d}-{self.tasks[self.stage.task].id}/{self.stage.name}"

    def folder(self, ref: StageRef) -> Path:
        """Return where an input of the stage lies."""
        return Path(self.folders[ref])


def replayed_rows(job: Job) -> int:
    """Return how many rows of each earlier task a Train stage replays, or a Generate stage writes."""
    stage = job.stage
    assert isinstance(stage, Train | Generate)
    if stage.budget is None:
        return stage.replay_rows if isinstance(stage, Train) else 0
    earlier = stage.sources if isinstance(stage, Generate) else stage.replay
    return stage.budget.per_task(len(task_data(job, stage.task).train), len(earlier))


def row_length(job: Job, task: int) -> int:
    """Return where a stage cuts the rows of a task: as the task's own settings say, unless the stage has its own."""
    own = isinstance(job.stage, Train) and job.stage.settings is not None
    return job.train.max_length if own else job.max_length[task]


def task_data(job: Job, task: int) -> TaskData:
    """Return the published rows of a task, mapped once per process.

    Raises:
        DataError: If this machine sees other rows than the driver published.
    """
    loaded = _mapped(job.rows[task])
    if loaded.digests != job.digests[task]:
        raise DataError(f"task {loaded.id}: {job.rows[task]} holds other rows than the driver published; resume")
    return loaded


@lru_cache(maxsize=128)
def _mapped(folder: str) -> TaskData:
    return published(Path(folder))
