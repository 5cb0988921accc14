"""What a method is: a plan (pure, torch-free) and a learner (how one worker trains)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from cl_dist.config import Section
from cl_dist.data.rows import Row, TaskData
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import ConfigError
from cl_dist.stage import Evaluate, Stage, StageRef, Train, model_after

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_dist.models.classifier import Batch
    from cl_dist.models.config import ModelConfig
    from cl_dist.parallel.engine import GradScale, Pull


class MethodConfig(Section):
    """Settings of a method; each method derives its own."""

    name: str


@dataclass(frozen=True, slots=True)
class TaskSequence:
    """The tasks in learned order."""

    tasks: tuple[TaskConfig, ...]

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """An entry of METHODS; nothing inherits from it."""

    config: type[MethodConfig]
    plan: Callable[[Any, TaskSequence, int], list[Stage]]
    """(config, tasks, t) -> the stages of task t, in order. Pure: no torch, no Ray, no disk."""
    learners: Mapping[str, str]
    """Learner classes by name, as 'module:Class'; resolved in the worker, so that a driver needs no torch. The one of
    name "classifier" picks a label, "lm" generates text: `science.model.output` chooses, else it is the first."""
    about: str
    """One line for `cl-dist list methods`."""
    penalises: bool = False
    """Whether its learner has `pulls`."""
    takes_quantized: bool = False
    """Whether its learner works beside layers whose weights are quantized: it neither trains nor wraps them."""

    def output(self, wanted: str | None) -> str:
        """Return what a run of this method puts on the backbone: "classifier" or "lm" (a language-model head).

        Raises:
            ConfigError: If the method does not support `wanted`.
        """
        known = [name for name in self.learners if name in ("classifier", "lm")]
        if wanted is None or wanted in known:
            return wanted or known[0]
        raise ConfigError(f"science.model.output={wanted!r}: this method supports {known[0]!r}")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands; equal on all ranks."""

    step: int
    """Optimizer steps of this stage so far."""
    total_steps: int
    round_step: int
    """Optimizer steps since this round began: 0 .. round_steps - 1."""
    round_steps: int


class Rows(Protocol):
    """Encoded rows of one or more tasks, numbered through: ClassifyRows or LanguageRows."""

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task, cut at max_length tokens where that is not the length of the collection."""

    def __len__(self) -> int: ...

    def length(self, number: int) -> int:
        """Return the tokens of a row."""

    def by_length(self, indices: Iterable[int] | None = None) -> list[int]:
        """Return row numbers from long to short."""

    def normalizers(self, indices: Collection[int]) -> dict[str, float]:
        """Return what each term of a loss over these rows is divided by; their number where a term is not named."""

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> Batch:
        """Return the rows of these numbers as one batch; -1 stands for a dummy of weight 0."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Named terms of a loss; their sum is minimised."""

    rows: Mapping[str, Tensor]
    """Per row (B,), unreduced: the loop weights them and divides by the units of the *global* batch (see Rows)."""
    own: Mapping[str, Tensor]
    """Scalars that depend on parameters alone, such as a sparsity term: equal on all ranks, not summed over them."""


class Learner(ABC):
    """Lives inside one worker, for one stage. A method must `build` and give a `loss`; the rest defaults to nothing.

    num_labels[t] is the number of classes of task t, for the tasks up to the one at hand.
    """

    model: nn.Module
    """Set by build."""
    output: ClassVar[Literal["classifier", "lm"]] = "classifier"
    """Whether it picks a class or writes an answer: decides how rows are encoded, which backbone is loaded and how the
    model is scored."""
    end_rows: ClassVar[int] = 0
    """How many train rows end_task wants to see; above 0 it is given the finished model, whole on every rank."""

    def __init__(self, config: Any, num_labels: tuple[int, ...], model: ModelConfig, seed: int) -> None:
        self.config, self.num_labels, self.model_config, self.seed = config, num_labels, model, seed
        self.pooling = model.pooling

    @property
    def takes_partitioned(self) -> bool:
        """Whether it can build on a backbone that is cut up over the ranks already.

        It then reads none of the backbone's weights before training but those that it copies.
        """
        return False

    @property
    def freezes_backbone(self) -> bool:
        """Whether nothing of the backbone is trained."""
        return False

    @abstractmethod
    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """Shape the model for the tasks 0..task. Stored weights are loaded into it afterwards."""

    @abstractmethod
    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the loss of a micro-batch; model is the engine, the only legal way forward in training.

        Sets whatever training needs (slope, noise, head) itself, since scoring dev rows may have come in between.
        """

    def freeze(self, units: list[tuple[int, int]]) -> None:
        """Take the (layer, unit) pairs that a vote has chosen out of training; after start_task."""
        raise ConfigError(f"{type(self).__name__} freezes nothing by vote")

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, training: bool) -> Rows:
        """Return an empty collection that encodes rows as this learner reads them, in training or when it is scored.

        Raises:
            ConfigError: If the model cannot read so long a row.
        """
        from transformers import PreTrainedModel

        from cl_dist.data.classify import ClassifyRows
        from cl_dist.models.config import check_length, max_positions

        backbone = next(part for part in self.model.modules() if isinstance(part, PreTrainedModel))
        check_length(max_length, max_positions(backbone.config.to_dict()))
        return ClassifyRows(tokenizer, max_length)

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss (B,) and whether it is right (B,) of each row of a scored batch."""
        from cl_dist.models.classifier import cross_entropy

        return cross_entropy(output, batch), output.argmax(-1) == batch["label"]

    @abstractmethod
    def activate(self, task: int, without: str | None = None) -> None:
        """Prepare for scoring a task (its head, masks, adapters), with one part switched off where asked."""

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Choose what this stage trains, after the earlier weights are in place; tasks are those its rows come from."""

    def resize_stored(self, name: str, stored: Tensor, initial: Tensor) -> Tensor:
        """Return a stored weight in the shape that the model has now; initial is what the model was built with."""
        return stored

    def grad_scales(self) -> Mapping[str, GradScale]:
        """Return elementwise gradient factors by parameter name."""
        return {}

    def pulls(self) -> Mapping[str, Pull]:
        """Return quadratic penalties by parameter name."""
        return {}

    def learning_rates(self) -> Mapping[str, float]:
        """Return learning rates of parameters that depart from train.lr, by name."""
        return {}

    def end_task(self, masters: Mapping[str, Tensor], rows: Iterable[Batch]) -> None:
        """Consolidate what later tasks need: masks, for example. masters are the selected float32 weights.

        rows are batches of one train row each, this rank's share of `end_rows` rows.
        """

    def facts(self) -> dict[str, Any]:
        """Return what a report should know of the finished task, as plain data."""
        return {}

    def observe(self) -> dict[str, Tensor]:
        """Return what the last scored batch showed, one row of numbers (B, ...) by name: router decisions, say."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything besides weights that must outlive the task."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


def no_effect_scales(backbone: PreTrainedModel) -> dict[str, GradScale]:
    """Return gradient factors that keep the trained biases of a model's `backbone` which change nothing."""
    from cl_dist.models.attention_slices import no_effect_biases
    from cl_dist.parallel.engine import GradScale

    return {
        f"backbone.{name}": GradScale(row=keep)
        for name, keep in no_effect_biases(backbone).items()
        if keep is not None and backbone.get_parameter(name).requires_grad
    }


def score_seen(task: int) -> Evaluate:
    """Score the tasks seen so far with the model after this one: the last stage of most plans."""
    return Evaluate(task=task, model=model_after(task), tasks=tuple(range(task + 1)))


def sequential_stages(tasks: TaskSequence, t: int) -> tuple[Train, Evaluate]:
    """Train the previous task's model on task t, then score all seen tasks."""
    return Train(task=t, data=(t,), init=model_after(t - 1) if t else None), score_seen(t)


def plan_sequential(config: Any, tasks: TaskSequence, t: int) -> list[Stage]:
    """Go on training the previous task's model, and score all seen tasks: the plan of most methods."""
    return list(sequential_stages(tasks, t))


def evaluated(task: int) -> StageRef:
    """Name the Evaluate stage of a task."""
    return StageRef(task=task, stage="evaluate")
