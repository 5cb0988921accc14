"""LoRA per task, by peft: low-rank updates and a head per task in a frozen backbone.

Source: Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from cl_dist.methods.base import Learner, Loss, Method, MethodConfig, Progress, plan_sequential
from cl_dist.models.config import LoraShape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cl_dist.models.classifier import Batch, Classifier


class LoraConfig(MethodConfig, LoraShape):
    """Settings of LoRA, named as in peft."""

    name: Literal["lora"] = "lora"


class Lora(Learner):
    """Trains one task's low-rank updates and head."""

    config: LoraConfig
    model: Classifier
    takes_partitioned = freezes_backbone = True

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner.

        Raises:
            ConfigError: If no layer of the backbone has a name in target_modules.
        """
        from cl_dist.models.classifier import Classifier
        from cl_dist.models.lowrank import add_update

        self.model = Classifier(backbone, self.pooling)
        for number, count in enumerate(self.num_labels):
            add_update(backbone, self.config, _name(number))
            self.model.add_head(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Learner."""
        from cl_dist.models.classifier import freeze

        freeze(self.model)
        self.activate(task)
        for name, parameter in self.model.backbone.named_parameters():
            parameter.requires_grad_(f".{_name(task)}." in name)
        self.model.heads[task].requires_grad_(True)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        from cl_dist.models.classifier import cross_entropy

        return Loss(rows={"ce": cross_entropy(model(batch), batch)}, own={})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner. What is trained stays so: peft would otherwise make the chosen updates trainable."""
        from cl_dist.models.lowrank import layers_with_updates

        self.model.task = task
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for _, layer in layers_with_updates(self.model.backbone):
            layer.set_adapter(_name(task), inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_(True)


def _name(task: int) -> str:
    return f"task{task}"


METHOD = Method(
    config=LoraConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.methods.lora:Lora"},
    about="low-rank updates of its own for every task, through peft, in a frozen backbone",
)
