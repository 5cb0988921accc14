"""Fine-tuning of a classifier: backbone and heads, or heads alone."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.learners.base import Learner, Loss, Progress, no_effect_transforms
from cl_dist.methods.finetune import TunedConfig
from cl_dist.models.architectures import embedding_names
from cl_dist.models.attention_slices import no_effect_biases
from cl_dist.models.classifier import Batch, Classifier, cross_entropy, freeze
from cl_dist.parallel.gradients import GradientTransform
from cl_dist.parallel.seeds import seeded


class Finetune(Learner):
    """A classifier whose heads, and backbone unless `tune: head`, are trained."""

    config: TunedConfig
    model: Classifier

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        if self.config.tune == "head":
            freeze(backbone)
        self.model = Classifier(backbone, self.pooling)
        for number, count in enumerate(self.num_labels):
            with seeded(self.seed, "head", number):  # independent of earlier heads, which `individual` does not have
                self.model.add_head(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Train the heads of the tasks at hand, and what their logits depend on.

        A pooler that is not used would be a parameter without a gradient. Biases without effect stay as they are (see
        models.attention_slices.no_effect_biases).
        """
        for number, head in enumerate(self.model.heads):
            head.requires_grad_(number in tasks)
        pooler = getattr(self.model.backbone, "pooler", None)
        if pooler is not None and self.pooling != "pooler":
            pooler.requires_grad_(False)
        for name, keep in no_effect_biases(self.model.backbone).items():
            if keep is None:
                self.model.backbone.get_parameter(name).requires_grad_(False)
        if self.config.tune == "layers":
            for name in embedding_names(self.model.backbone):
                self.model.backbone.get_parameter(name).requires_grad_(False)
        self.mixed = len(tasks) > 1

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        """Freeze the biases without effect that share a vector with others."""
        return no_effect_transforms(self.model.backbone)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        self.model.task = None if self.mixed else len(self.num_labels) - 1
        return Loss({"ce": cross_entropy(model(batch), batch)})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner."""
        self.model.task = task
