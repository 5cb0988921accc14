"""Houlsby adapters: trains one task's bottlenecks, norms and head in a frozen backbone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.learners.base import Learner, Loss, Progress
from cl_dist.methods.houlsby import HoulsbyConfig
from cl_dist.models.classifier import Batch, cross_entropy
from cl_dist.models.task_modules import AdapterClassifier


class Houlsby(Learner):
    """Trains one task's bottlenecks, norms and head."""

    config: HoulsbyConfig
    model: AdapterClassifier

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        self.model = AdapterClassifier(backbone, self.config.size, self.pooling)
        for count in self.num_labels:
            self.model.add_task(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Learner."""
        self.model.start_task(task)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        return Loss({"ce": cross_entropy(model(batch), batch)})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner."""
        self.model.activate(task)
