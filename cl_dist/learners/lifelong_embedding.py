"""Lifelong embeddings: trains one task's embedding table and head, and the shared layers under a penalty."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from cl_dist.learners.finetune import Finetune
from cl_dist.methods.lifelong_embedding import LifelongEmbeddingConfig
from cl_dist.models.task_modules import ActiveTask, TaskEmbeddings
from cl_dist.parallel.gradients import Penalty, QuadraticPenalty


class LifelongEmbedding(Finetune):
    """Trains one task's table and head, and the shared layers slowly."""

    config: LifelongEmbeddingConfig

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
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

    def penalties(self) -> Mapping[str, Penalty]:
        """Pull the shared layers towards their weights before the task; the first task moves them freely."""
        if len(self.num_labels) == 1 or self.config.strength == 0:
            return {}
        own = {id(parameter) for parameter in self._tables.parameters()}
        return {
            name: QuadraticPenalty(strength=self.config.strength, anchor=parameter.detach().clone())
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in own and not name.startswith("heads.")
        }
