"""What a worker is given: a stage and the settings it uses, and how it builds the model that the stage starts from."""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from safetensors.torch import load_file

from cl_dist.data.load import load_task
from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import CheckpointError, DataError
from cl_dist.methods import METHODS
from cl_dist.methods.base import Learner, MethodConfig
from cl_dist.models.backbone import load_backbone
from cl_dist.models.config import ModelConfig
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.seeds import seeded
from cl_dist.stage import EvaluateConfig, Stage, TrainConfig
from cl_dist.stages.weights import StoredWeights

LEARNER = "learner.safetensors"


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
    engine: EngineConfig
    seed: int
    chain: tuple[str, ...]
    """Folders of the Train stages whose weights make up the model, oldest first."""


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


def new_learner(method: MethodConfig, name: str, num_labels: tuple[int, ...], pooling: str, seed: int) -> Learner:
    """Return a method's learner of a name, without a model yet."""
    module, _, cls = METHODS[method.name].learners[name].partition(":")
    kind: type[Learner] = getattr(import_module(module), cls)
    return kind(method, num_labels, pooling, seed)


def build_learner(job: Job, up_to: int | None = None) -> Learner:
    """Return the stage's learner with its model: backbone, parts of all tasks so far, stored weights.

    New parts are drawn from a seed of (run seed, task id), so every rank and every restart draws the same. With up_to,
    parts of later tasks are neither made nor read: what scores an early task needs no capsules of later ones.

    Raises:
        CheckpointError: If a stored file is missing or does not fit the model.
    """
    name = job.stage.learner if job.stage.kind == "train" else "main"
    last = job.stage.task if up_to is None else up_to
    num_labels = tuple(len(task_data(job, task).labels) for task in range(last + 1))
    learner = new_learner(job.method, name, num_labels, job.model.pooling, job.seed)
    with seeded(job.seed, "build", job.tasks[last].id):
        model = learner.build(load_backbone(job.model), last)
    known = model.state_dict().keys()
    for folder in job.chain:
        stored = StoredWeights(folder)
        if last == job.stage.task and (unexpected := stored.keys() - known):
            raise CheckpointError(f"{folder}: holds weights of {min(unexpected)!r}, which this model does not have")
        try:
            model.load_state_dict({name: stored[name] for name in stored if name in known}, strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: weights do not fit the model: {error}") from error
    if job.chain and (Path(job.chain[-1]) / LEARNER).exists():
        learner.load_state_dict(load_file(Path(job.chain[-1]) / LEARNER))
    return learner
