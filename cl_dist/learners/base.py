"""The interface between a method and the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.data.classify import ClassifyRows
from cl_dist.data.rows import Row, TaskData
from cl_dist.errors import ConfigError
from cl_dist.models.attention_slices import no_effect_biases
from cl_dist.models.classifier import Batch, cross_entropy
from cl_dist.models.config import ModelConfig, check_length, max_positions
from cl_dist.parallel.gradients import GradientTransform, GradScale, Penalty


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a step in its stage; equal on all ranks."""

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
        """Append rows of a task, truncated to max_length tokens; None takes the collection's own length."""

    def __len__(self) -> int: ...

    def length(self, number: int) -> int:
        """Return the tokens of a row."""

    def by_length(self, indices: Iterable[int] | None = None) -> list[int]:
        """Return row numbers from long to short."""

    def normalizers(self, indices: Collection[int]) -> dict[str, float]:
        """Return the divisor of each loss term over these rows; a term that is not named is divided by their number."""

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> Batch:
        """Return the rows of these numbers as one batch; -1 stands for a dummy of weight 0."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Named terms of a loss; their sum is minimised."""

    per_example: Mapping[str, Tensor]
    """(B,), unreduced: the loop weights them and divides by the normalizers of the *global* batch (see Rows)."""
    regularizers: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars that are equal on all ranks and not summed over them, such as the sparsity of masks.

    They are computed from tensors that the model recorded in its forward pass. Outside it ZeRO-3 has emptied the
    parameters, and reading one raises EmptiedParameterError. A term of one parameter alone belongs into `penalties`.
    """


class Learner(ABC):
    """Lives inside one worker, for one stage. A method must `build` and give a `loss`; the rest defaults to nothing.

    num_labels[t] is the number of classes of task t, for the tasks up to the one at hand.
    """

    model: nn.Module
    """Set by build."""

    def __init__(self, config: Any, num_labels: tuple[int, ...], model: ModelConfig, seed: int) -> None:
        self.config, self.num_labels, self.model_config, self.seed = config, num_labels, model, seed
        self.pooling = model.pooling

    @abstractmethod
    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """Build the model for the tasks 0..task. Stored weights are loaded into it afterwards."""

    @abstractmethod
    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the loss of a micro-batch; model is the engine, the only legal way forward in training.

        Sets whatever training needs (slope, noise, head) itself, since scoring dev rows may have come in between.
        """

    def freeze(self, units: list[tuple[int, int]]) -> None:
        """Take the (layer, unit) pairs that a vote has chosen out of training; after start_task."""
        raise ConfigError(f"{type(self).__name__} freezes nothing by vote")

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, training: bool) -> Rows:
        """Return an empty collection that encodes rows as this learner reads them, in training or in scoring.

        Raises:
            ConfigError: If max_length exceeds the model's positions.
        """
        backbone = next(part for part in self.model.modules() if isinstance(part, PreTrainedModel))
        check_length(max_length, max_positions(backbone.config.to_dict()))
        return ClassifyRows(tokenizer, max_length)

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss (B,) and whether it is right (B,) of each row of a scored batch."""
        return cross_entropy(output, batch), output.argmax(-1) == batch["label"]

    @abstractmethod
    def activate(self, task: int, without: str | None = None) -> None:
        """Prepare for scoring a task (its head, masks, adapters), with one part switched off if named."""

    source: int | None = None
    """The earlier task that the stage's task starts from: what `nearest` has found, unless settings name one."""

    def nearest(self, batches: Iterable[Batch]) -> int | None:
        """Return the earlier task from whose parts the stage's task should start; None for none of them.

        Called before `start_task` if `Capabilities.start_rows` is above 0, on rank 0, whose answer all ranks take.
        batches are train rows of the stage's task. The model has its stored weights and is on this rank's device.
        """
        return None

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Choose the parameters that this stage trains, after stored weights are loaded.

        tasks: the tasks of the stage's rows.
        """

    def resize_stored(self, name: str, stored: Tensor, initial: Tensor) -> Tensor:
        """Return a stored weight in the shape that the model has now; initial is the value that `build` gave it."""
        return stored

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        """Return linear maps of gradients by parameter name: masks, factors, projections."""
        return {}

    def penalties(self) -> Mapping[str, Penalty]:
        """Return penalties by parameter name; each gets the whole float32 value of its parameter.

        Called once per stage, after start_task and before an engine exists: earlier tasks' parameters can be read then.
        """
        return {}

    def learning_rates(self) -> Mapping[str, float]:
        """Return learning rates of parameters that depart from train.lr, by name."""
        return {}

    def end_task(self, masters: Mapping[str, Tensor], rows: Iterable[Batch]) -> None:
        """Consolidate the state that later tasks need: masks, for example. masters are the selected float32 weights.

        rows are batches of one train row each, this rank's share of `Capabilities.end_rows` rows.
        """

    def report_info(self) -> dict[str, Any]:
        """Return facts about the finished task for the report, as plain data."""
        return {}

    def observe(self) -> dict[str, Tensor]:
        """Return measurements of the last scored batch, one row of numbers (B, ...) by name: router decisions, say."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything besides weights that must outlive the task."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


def no_effect_transforms(backbone: PreTrainedModel) -> dict[str, GradScale]:
    """Return transforms that freeze the trained biases of a model's `backbone` which have no effect on its output."""
    return {
        f"backbone.{name}": GradScale(row=keep)
        for name, keep in no_effect_biases(backbone).items()
        if keep is not None and backbone.get_parameter(name).requires_grad
    }
