"""Houlsby adapters: bottlenecks, norms and a head per task in a frozen backbone. Nothing is shared, nothing forgotten.

Source: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP". The mathematics is in models/adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cl_dist.methods.base import Learner, Loss, Method, MethodConfig, Progress, plan_sequential

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cl_dist.models.adapters import AdapterClassifier
    from cl_dist.models.classifier import Batch


class AdapterConfig(MethodConfig):
    """Settings of adapters."""

    name: Literal["adapter"] = "adapter"
    size: int = Field(64, gt=0)
    """Width of the bottleneck."""


class Adapter(Learner):
    """Trains one task's bottlenecks, norms and head."""

    config: AdapterConfig
    model: AdapterClassifier
    takes_partitioned = freezes_backbone = True

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        from cl_dist.models.adapters import AdapterClassifier

        self.model = AdapterClassifier(backbone, self.config.size, self.pooling)
        for count in self.num_labels:
            self.model.add_task(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Learner."""
        self.model.start_task(task)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        from cl_dist.models.classifier import cross_entropy

        return Loss(rows={"ce": cross_entropy(model(batch), batch)}, own={})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner."""
        self.model.activate(task)


METHOD = Method(
    config=AdapterConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.methods.adapter:Adapter"},
    about="bottleneck adapters of its own for every task in a frozen backbone",
    takes_quantized=True,
)
