"""LoRA per task: trains one task's low-rank updates and head."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.learners.base import Learner, Loss, Progress
from cl_dist.methods.lora import LoraConfig
from cl_dist.models.classifier import Batch, Classifier, cross_entropy, freeze
from cl_dist.models.lowrank import add_update, layers_with_updates


class Lora(Learner):
    """Trains one task's low-rank updates and head."""

    config: LoraConfig
    model: Classifier

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner.

        Raises:
            ConfigError: If no layer of the backbone has a name in target_modules.
        """
        self.model = Classifier(backbone, self.pooling)
        for number, count in enumerate(self.num_labels):
            add_update(backbone, self.config, _name(number))
            self.model.add_head(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Learner."""
        freeze(self.model)
        self.activate(task)
        for name, parameter in self.model.backbone.named_parameters():
            parameter.requires_grad_(f".{_name(task)}." in name)
        self.model.heads[task].requires_grad_(True)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        return Loss({"ce": cross_entropy(model(batch), batch)})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner. What is trained stays so: peft would otherwise make the chosen updates trainable."""
        self.model.task = task
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for _, layer in layers_with_updates(self.model.backbone):
            layer.set_adapter(_name(task), inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_(True)


def _name(task: int) -> str:
    return f"task{task}"
