"""LAMOL: trains a language model to answer, and to generate samples of its tasks."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

from torch import Tensor

from cl_dist.data.language import LM, QA, EncodingOptions
from cl_dist.learners.base import Loss, Progress
from cl_dist.learners.text import TextLearner
from cl_dist.methods.lamol import LamolConfig
from cl_dist.models.causal import DISTANCE, LOSS, per_row
from cl_dist.models.classifier import Batch
from cl_dist.models.config import LoraShape


class Lamol(TextLearner):
    """Trains the language model to answer, and to write rows of each task after the token that asks for them."""

    config: LamolConfig

    @property
    def lora(self) -> LoraShape | None:
        """See TextLearner."""
        return self.config.lora

    @property
    def tune(self) -> Literal["all", "layers", "head"]:
        """See TextLearner."""
        return self.config.tune

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See TextLearner. With distillation a copy of the model before the task is the teacher."""
        super().start_task(task, tasks)
        self.model.teach(deepcopy(self.model.backbone) if task and self.config.distill else None)

    def encoding_options(self, *, training: bool) -> EncodingOptions:
        """See TextLearner: in training each row is a question and a sample."""
        return EncodingOptions(
            samples=training and self.config.lm_weight > 0,
            per_task=self.config.task_token == "task",
            ans_weight=self.config.ans_weight,
        )

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the loss of each row as a question and as a sample, summed over its labels."""
        output_N3 = model(batch)
        share_N = self.config.distill * batch["replayed"][batch["owner"]]
        loss_N = (1 - share_N) * output_N3[:, LOSS] + share_N * output_N3[:, DISTANCE]
        rows = {"qa_loss": per_row(loss_N, batch, QA)}
        if self.config.lm_weight:
            rows["lm_loss"] = self.config.lm_weight * per_row(loss_N, batch, LM)
        return Loss(rows)
