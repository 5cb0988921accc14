"""Lifelong embeddings: a table of word embeddings per task, over layers that all tasks share and that change slowly.

Each task reads through a table of its own, which starts from the mean of the earlier tasks' tables. The layers above
are trained by every task under strength / 2 * |w - w*|^2, w* being their weights before the task: what a task needs
goes into its table first, and into the shared part only where that pays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cl_dist.methods.base import Method, plan_sequential
from cl_dist.methods.finetune import Finetune, TunedConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from cl_dist.parallel.engine import Pull


class LifelongEmbeddingConfig(TunedConfig):
    """Settings of lifelong embeddings; with `tune: head` the shared layers are frozen, tables and heads are trained."""

    name: Literal["lifelong_embedding"] = "lifelong_embedding"
    strength: float = Field(1.0, ge=0)
    """Weight of the pull on the shared layers; 0 lets them go freely."""


class LifelongEmbedding(Finetune):
    """Trains one task's table and head, and the shared layers slowly."""

    config: LifelongEmbeddingConfig
    takes_partitioned = False  # it starts tables from whole ones, and pulls whole weights back

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        from torch import nn

        from cl_dist.models.adapters import ActiveTask, TaskEmbeddings

        base = backbone.get_input_embeddings()
        assert isinstance(base, nn.Embedding)  # so it is in every architecture of the table
        self._active = ActiveTask()
        self._tables = TaskEmbeddings(base, self._active)
        for _ in self.num_labels:
            self._tables.add_task()
        backbone.set_input_embeddings(self._tables)
        return super().build(backbone, task)

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Start the task's table from the earlier ones, and freeze those."""
        super().start_task(task, tasks)
        if task:
            self._tables.inherit(task)
        self._tables.requires_grad_(False)
        self._tables.tables[task].requires_grad_(True)
        self._active.task = task

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner."""
        super().activate(task)
        self._active.task = task

    def pulls(self) -> Mapping[str, Pull]:
        """Hold the shared layers near their weights before the task; the first task may move them freely."""
        from cl_dist.parallel.engine import Pull

        if len(self.num_labels) == 1 or self.config.strength == 0:
            return {}
        own = {id(parameter) for parameter in self._tables.parameters()}
        return {
            name: Pull(strength=self.config.strength, anchor=parameter.detach().clone())
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in own and not name.startswith("heads.")
        }


METHOD = Method(
    config=LifelongEmbeddingConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.methods.lifelong_embedding:LifelongEmbedding"},
    about="word embeddings of its own for every task, under shared layers that change slowly",
)
