"""Baselines that train one classifier with no protection: sequential, individual and joint.

They give forgetting, transfer and intransigence a meaning: `sequential` goes on training one model (the lower bound),
`individual` starts every task from the backbone (ONE), `joint` trains on all tasks at once (the upper bound).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from cl_dist.methods.base import (
    Learner,
    Loss,
    Method,
    MethodConfig,
    Progress,
    TaskSequence,
    evaluated,
    no_effect_scales,
    plan_sequential,
    score_seen,
)
from cl_dist.stage import Evaluate, Stage, Train, model_after

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cl_dist.models.classifier import Batch, Classifier
    from cl_dist.parallel.engine import GradScale


class TunedConfig(MethodConfig):
    """Settings of every method that trains the backbone itself."""

    tune: Literal["all", "layers", "head"] = "all"
    """What is trained: the whole backbone with the head, all of it but the embeddings, or the head alone."""


class FinetuneConfig(TunedConfig):
    """Settings of the unprotected baselines."""

    name: Literal["sequential", "individual", "joint"]


def plan_individual(config: FinetuneConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Start from the backbone. Earlier tasks keep their own models, so their earlier scores stand."""
    score = Evaluate(task=t, model=model_after(t), tasks=(t,), previous=evaluated(t - 1) if t else None)
    return [Train(task=t, data=(t,)), score]


def plan_joint(config: FinetuneConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train once, on all tasks together, when the last one has arrived."""
    if t < len(tasks) - 1:
        return []
    return [Train(task=t, data=tuple(range(t + 1))), score_seen(t)]


class Finetune(Learner):
    """A classifier whose heads, and backbone unless `tune: head`, are trained."""

    config: TunedConfig
    model: Classifier

    @property
    def takes_partitioned(self) -> bool:
        """See Learner. A pooler may not be in the file, and then be drawn in another way where it is cut up."""
        return self.pooling != "pooler"

    @property
    def freezes_backbone(self) -> bool:
        """See Learner."""
        return self.config.tune == "head"

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        from cl_dist.models.classifier import Classifier, freeze
        from cl_dist.parallel.seeds import seeded

        if self.config.tune == "head":
            freeze(backbone)
        self.model = Classifier(backbone, self.pooling)
        for number, count in enumerate(self.num_labels):
            with seeded(self.seed, "head", number):  # whatever heads came before: `individual` knows nothing of them
                self.model.add_head(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Train the heads of the tasks at hand, and what their logits depend on.

        A pooler that is not used would be a parameter without a gradient. Biases that change nothing stay as they are
        (see models.heads.idle_biases).
        """
        from cl_dist.models.architectures import embedding_names
        from cl_dist.models.attention_slices import no_effect_biases

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

    def grad_scales(self) -> Mapping[str, GradScale]:
        """Keep the biases that change nothing where others lie in the same vector."""
        return no_effect_scales(self.model.backbone)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row."""
        from cl_dist.models.classifier import cross_entropy

        self.model.task = None if self.mixed else len(self.num_labels) - 1
        return Loss(rows={"ce": cross_entropy(model(batch), batch)}, own={})

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner."""
        self.model.task = task


_LEARNERS = {"classifier": "cl_dist.methods.finetune:Finetune", "lm": "cl_dist.methods.text:TextLearner"}
SEQUENTIAL = Method(
    config=FinetuneConfig,
    plan=plan_sequential,
    learners=_LEARNERS,
    about="one model, trained on task after task",
)
INDIVIDUAL = Method(
    config=FinetuneConfig,
    plan=plan_individual,
    learners=_LEARNERS,
    about="a model of its own for every task (ONE)",
)
JOINT = Method(config=FinetuneConfig, plan=plan_joint, learners=_LEARNERS, about="one model on all tasks at once")
