"""Construction of a stage's learner and model on a worker."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.errors import CheckpointError, ConfigError
from cl_dist.learners.base import Learner
from cl_dist.methods import capabilities_of, get_method
from cl_dist.methods.base import MethodConfig
from cl_dist.models.architectures import layers_of
from cl_dist.models.backbone import load_backbone, lower
from cl_dist.models.config import ModelConfig
from cl_dist.parallel import params
from cl_dist.parallel.device_map import dispatch
from cl_dist.parallel.seeds import seeded
from cl_dist.parallel.world import World
from cl_dist.parallel.zero3_init import partitioned_init
from cl_dist.stage import Rationalise, Train
from cl_dist.stages.stage_job import Job, task_data
from cl_dist.stages.weights import ShardedWeights

M = TypeVar("M", bound=nn.Module)
LEARNER = "learner.safetensors"


def new_learner(
    method: MethodConfig, model: ModelConfig, num_labels: tuple[int, ...], seed: int, name: str | None = None
) -> Learner:
    """Return a method's learner without a model: that of the run's output, unless another is named.

    Raises:
        ConfigError: If the learner's module does not have it, or cannot be imported.
    """
    entry = get_method(method.name)
    path = entry.learners[name or entry.output(model.output)]
    module, _, cls = path.partition(":")
    try:
        kind: type[Learner] = getattr(import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method {method.name!r}: its learner {path!r} cannot be imported: {error}") from error
    return kind(method, num_labels, model, seed)


def writes_text(method: MethodConfig, model: ModelConfig) -> bool:
    """Return whether a run of this method generates its answers, by a language-model head."""
    return get_method(method.name).output(model.output) == "lm"


def to_inference(job: Job, model: M) -> M:
    """Convert a trained model to the precision of its forward pass and move it to this worker's devices."""
    if job.model.dtype == "bfloat16":
        lower(model)  # before it moves to a device, where float32 may not fit
    backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    return dispatch(model, type(layers_of(backbone)[0][1])).eval().requires_grad_(False)


class _ResizedWeights(Mapping[str, Tensor]):
    """Stored weights by name, from the newest of several folders, read on access and resized to a model's shapes.

    Those of partitioned parameters are not resized.
    """

    def __init__(self, learner: Learner, stored: Mapping[str, ShardedWeights], own: Mapping[str, Tensor]) -> None:
        self._learner, self._stored, self._own = learner, stored, own

    def __getitem__(self, name: str) -> Tensor:
        value = self._stored[name][name]
        return self._learner.resize_stored(name, value, self._own[name]) if self._own[name].numel() else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def loads_partitioned(method: MethodConfig, model: ModelConfig, learner: str | None = None) -> bool:
    """Return whether ZeRO-3 can partition a backbone while it is loaded."""
    able = capabilities_of(method, model, learner).takes_partitioned
    return able and model.config is None and model.weight_bits is None


def build_learner(
    job: Job, up_to: int | None = None, *, partitioned: bool = False, for_inference: bool = False
) -> Learner:
    """Return the stage's learner with its model: backbone, parts of all tasks so far, stored weights.

    New parts are initialized with a seed of (run seed, task id), the same on every rank and after every restart.

    Args:
        job: The stage's job.
        up_to: Last task whose parts are built and loaded; later parts are not needed to score an earlier task.
        partitioned: Partition the backbone over the ranks while it is loaded, if the learner supports it; a collective.
            It is float32 then, for the engine's masters and for copies of its modules.
        for_inference: Load the backbone in the precision of its forward pass.

    Raises:
        CheckpointError: If a stored file is missing or does not fit the model.
    """
    stage = job.stage
    name = stage.learner if isinstance(stage, Train | Rationalise) else None
    number = [stage.trial] if isinstance(stage, Train) and stage.trial is not None else []
    last = job.stage.task if up_to is None else up_to
    num_labels = tuple(len(task_data(job, task).labels) for task in range(last + 1))
    learner = new_learner(job.method, job.model, num_labels, job.seed, name)
    partitioned = partitioned and loads_partitioned(job.method, job.model, name)
    cut = partitioned_init(job.engine, World.current()) if partitioned else nullcontext()
    with seeded(job.seed, "build", job.tasks[last].id, *number):
        with cut:
            dtype = torch.bfloat16 if for_inference and job.model.dtype == "bfloat16" else torch.float32
            backbone = load_backbone(job.model, causal=writes_text(job.method, job.model), dtype=dtype)
        model = learner.build(backbone, last)
    own, world = model.state_dict(), World.current()
    latest: dict[str, ShardedWeights] = {}
    for folder in job.chain:
        stored = ShardedWeights(folder)
        if last == job.stage.task and (unexpected := stored.keys() - own.keys()):
            raise CheckpointError(f"{folder}: has weights of {min(unexpected)!r}, which this model does not have")
        latest |= {name: stored for name in stored if name in own}
    try:
        params.load(model, _ResizedWeights(learner, latest, own), world.rank)
    except CheckpointError as error:
        raise CheckpointError(f"{job.chain[-1]}: weights do not fit the model: {error}") from error
    if job.chain and (Path(job.chain[-1]) / LEARNER).exists():
        learner.load_state_dict(load_file(Path(job.chain[-1]) / LEARNER))
    return learner
