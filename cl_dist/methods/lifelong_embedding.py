"""Lifelong embeddings: a table of word embeddings per task, over layers that all tasks share and that change slowly.

Each task has a table of its own, which starts from the mean of the earlier tasks' tables. The layers above are trained
by every task under strength / 2 * |w - w*|^2, w* being their weights before the task: changes go into the table first,
and into the shared part only where they lower the loss enough.
"""

from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Capabilities, Method, plan_sequential
from cl_dist.methods.finetune import TunedConfig
from cl_dist.models.config import ModelConfig


class LifelongEmbeddingConfig(TunedConfig):
    """Settings of lifelong embeddings; with `tune: head` the shared layers are frozen, tables and heads are trained."""

    name: Literal["lifelong_embedding"] = "lifelong_embedding"
    strength: float = Field(1.0, ge=0)
    """Weight of the pull on the shared layers; 0 lets them go freely."""


def capabilities(config: LifelongEmbeddingConfig, model: ModelConfig) -> Capabilities:
    """Return what lifelong embeddings can do. Tables and anchors are copies of whole weights."""
    return Capabilities(freezes_backbone=config.tune == "head", penalties=config.strength > 0)


METHOD = Method(
    config=LifelongEmbeddingConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.learners.lifelong_embedding:LifelongEmbedding"},
    capabilities=capabilities,
    about="word embeddings of its own for every task, under shared layers that change slowly",
)
