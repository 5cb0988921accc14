"""Baselines that train one classifier with no protection: sequential, individual and joint.

They give forgetting, transfer and intransigence a meaning: `sequential` goes on training one model (the lower bound),
`individual` starts every task from the backbone (ONE), `joint` trains on all tasks at once (the upper bound).
"""

from dataclasses import replace
from typing import Literal

from cl_dist.methods.base import (
    Capabilities,
    Method,
    MethodConfig,
    TaskSequence,
    evaluated,
    plan_sequential,
    score_seen,
)
from cl_dist.models.config import ModelConfig
from cl_dist.stage import Evaluate, Stage, Train, model_after


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


def capabilities(config: TunedConfig, model: ModelConfig) -> Capabilities:
    """Return what fine-tuning can do, of classifiers and of language models.

    A pooler that is not in the backbone's file is drawn in another way where the backbone is partitioned.
    """
    if model.output == "lm":
        return Capabilities(takes_partitioned=True)
    return Capabilities(freezes_backbone=config.tune == "head", takes_partitioned=model.pooling != "pooler")


def capabilities_individual(config: TunedConfig, model: ModelConfig) -> Capabilities:
    """Return what a model per task can do: tasks share nothing."""
    return replace(capabilities(config, model), isolated=True)


_LEARNERS = {"classifier": "cl_dist.learners.finetune:Finetune", "lm": "cl_dist.learners.text:TextLearner"}
SEQUENTIAL = Method(
    config=FinetuneConfig,
    plan=plan_sequential,
    learners=_LEARNERS,
    capabilities=capabilities,
    about="one model, trained on task after task",
)
INDIVIDUAL = Method(
    config=FinetuneConfig,
    plan=plan_individual,
    learners=_LEARNERS,
    capabilities=capabilities_individual,
    about="a model of its own for every task (ONE)",
)
JOINT = Method(
    config=FinetuneConfig,
    plan=plan_joint,
    learners=_LEARNERS,
    capabilities=capabilities,
    about="one model on all tasks at once",
)
