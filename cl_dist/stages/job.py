"""What a worker is given: a stage and the settings it uses, and how it builds the model that the stage starts from."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from cl_dist.data.load import load_task
from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import CheckpointError, DataError
from cl_dist.methods import METHODS
from cl_dist.methods.base import Learner, MethodConfig
from cl_dist.models.architectures import layers_of
from cl_dist.models.backbone import load_backbone, lower
from cl_dist.models.config import ModelConfig
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.divided import dividing
from cl_dist.parallel.seeds import seeded
from cl_dist.parallel.spread import spread
from cl_dist.parallel.world import World
from cl_dist.stage import EvaluateConfig, Generate, GenerateConfig, Rationalise, Ref, Stage, Train, TrainConfig
from cl_dist.stages.weights import StoredWeights

M = TypeVar("M", bound=nn.Module)
LEARNER = "learner.safetensors"
Due = Literal["", "save", "stop"]
"""What a Train stage is asked to do between two steps: save, or save and stop."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage with everything a worker needs to run it; plain data, sent to workers by any dispatcher."""

    stage: Stage
    method: MethodConfig
    model: ModelConfig
    tasks: tuple[TaskConfig, ...]
    """The tasks up to the stage's own, in learned order."""
    digests: tuple[dict[str, str], ...]
    """What the driver read of each task, by split: a worker that reads something else stops."""
    data: DataConfig
    train: TrainConfig
    """Settings of the stage's own task."""
    max_length: tuple[int, ...]
    """Longest input of each task when it is scored: as its own settings say, whichever task the model has come to."""
    evaluate: EvaluateConfig
    generate: GenerateConfig
    folders: Mapping[Ref, str]
    """Where the results of the stage's inputs lie."""
    engine: EngineConfig
    seed: int
    chain: tuple[str, ...]
    """Folders of the Train stages whose weights make up the model, oldest first."""

    @property
    def key(self) -> str:
        """Name of the stage as people see it, such as '02-laptop/train'."""
        return f"{self.stage.task:02d}-{self.tasks[self.stage.task].id}/{self.stage.name}"

    def folder(self, ref: Ref) -> Path:
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


def task_data(job: Job, task: int) -> TaskData:
    """Return the rows of a task, read once per process.

    Raises:
        DataError: If this machine reads other rows than the driver did.
    """
    loaded = _load(job.tasks[task].model_dump_json(), job.data.model_dump_json())
    if loaded.digests != job.digests[task]:
        raise DataError(f"task {loaded.id}: its files differ between machines, or changed after the run was started")
    return loaded


@lru_cache(maxsize=128)
def _load(task: str, data: str) -> TaskData:
    return load_task(TaskConfig.model_validate_json(task), DataConfig.model_validate_json(data))


def new_learner(
    method: MethodConfig, model: ModelConfig, num_labels: tuple[int, ...], seed: int, name: str | None = None
) -> Learner:
    """Return a method's learner, the one that the run answers with unless another is named, without a model yet."""
    entry = METHODS[method.name]
    module, _, cls = entry.learners[name or entry.answers(model.answers)].partition(":")
    kind: type[Learner] = getattr(import_module(module), cls)
    return kind(method, num_labels, model, seed)


def placed(job: Job, model: M) -> M:
    """Bring a finished model to the precision of its forward pass and to this worker's devices, ready to be read."""
    if job.model.dtype == "bfloat16":
        lower(model)  # before it goes to a device, where float32 may not fit
    backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    return spread(model, type(layers_of(backbone)[0][1])).eval()


def build_learner(job: Job, up_to: int | None = None, *, divided: bool = False, is_read: bool = False) -> Learner:
    """Return the stage's learner with its model: backbone, parts of all tasks so far, stored weights.

    New parts are drawn from a seed of (run seed, task id), so every rank and every restart draws the same. With up_to,
    parts of later tasks are neither made nor read: what scores an early task needs no capsules of later ones.
    divided cuts the backbone up over the ranks as it is loaded, where the learner can cope with that; all ranks call.
    is_read loads it in the precision of its forward pass: a model that is not trained needs no other.

    Raises:
        CheckpointError: If a stored file is missing or does not fit the model.
    """
    stage = job.stage
    name = stage.learner if isinstance(stage, Train | Rationalise) else None
    number = [stage.number] if isinstance(stage, Train) and stage.number is not None else []
    last = job.stage.task if up_to is None else up_to
    num_labels = tuple(len(task_data(job, task).labels) for task in range(last + 1))
    learner = new_learner(job.method, job.model, num_labels, job.seed, name)
    divided = divided and learner.takes_divided and job.model.config is None
    bf16 = job.model.dtype == "bfloat16"
    cut = dividing(job.engine, World.current(), bf16=bf16) if divided else nullcontext()
    with seeded(job.seed, "build", job.tasks[last].id, *number):
        with cut:
            dtype = torch.bfloat16 if is_read and job.model.dtype == "bfloat16" else torch.float32
            backbone = load_backbone(job.model, causal=learner.answers == "text", dtype=dtype)
        model = learner.build(backbone, last)
    own = model.state_dict()
    latest: dict[str, StoredWeights] = {}
    for folder in job.chain:
        stored = StoredWeights(folder)
        if last == job.stage.task and (unexpected := stored.keys() - own.keys()):
            raise CheckpointError(f"{folder}: holds weights of {min(unexpected)!r}, which this model does not have")
        latest |= {name: stored for name in stored if name in own}
    try:
        model.load_state_dict({n: learner.fitted(n, w[n], own[n]) for n, w in latest.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{job.chain[-1]}: weights do not fit the model: {error}") from error
    if job.chain and (Path(job.chain[-1]) / LEARNER).exists():
        learner.load_state_dict(load_file(Path(job.chain[-1]) / LEARNER))
    return learner
