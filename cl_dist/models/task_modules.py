"""Task-specific modules inside a backbone: layer norms, bottleneck adapters, embedding tables.

Axes: B rows, L tokens, H hidden units.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.models.architectures import architecture, layers_of
from cl_dist.models.backbone import replace
from cl_dist.models.classifier import Classifier, freeze
from cl_dist.partition import gathered


@dataclass
class ActiveTask:
    """Index of the active task; one object, shared by all task-specific modules of a model."""

    task: int = 0


def full_copy(module: nn.Module) -> nn.Module:
    """Return a copy with full weights; a collective if ZeRO-3 has partitioned the module."""
    copy = deepcopy(module)
    for own, base in zip(copy.parameters(), module.parameters(), strict=True):
        with gathered(base) as values:
            own.data = values.clone()
    return copy


class TaskNorms(nn.Module):
    """A layer norm per task, each initialized from the backbone's."""

    def __init__(self, base: nn.Module, active: ActiveTask) -> None:
        super().__init__()
        self.base, self._active = base, active
        self.norms = nn.ModuleList()

    def add_task(self) -> None:
        """Append the norm of the next task."""
        self.norms.append(full_copy(self.base))

    def forward(self, x_BLH: Tensor) -> Tensor:
        """Normalise with the active task's scale and shift: (B, L, H)."""
        return self.norms[self._active.task](x_BLH)


def insert_modules(
    backbone: PreTrainedModel, active: ActiveTask, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[list[str], list[TaskNorms]]:
    """Wrap the output module of every sub-block with `wrap`, and replace its norm by a norm per task.

    Returns the sub-blocks' names ("<layer>.<sub-block>") and the norms, in order.
    """
    row = architecture(backbone)
    names: list[str] = []
    all_norms: list[TaskNorms] = []
    for number, (_, layer) in enumerate(layers_of(backbone)):
        for block in row.sub_blocks:
            norm = None if block.norm is None else layer.get_submodule(block.norm)
            if norm is not None and any(True for _ in norm.parameters()):  # norms without weights are shared
                all_norms.append(TaskNorms(norm, active))
                replace(layer, block.norm or "", all_norms[-1])
            replace(layer, block.output, wrap(layer.get_submodule(block.output)))
            names.append(f"{number}.{block.name}")
    return names, all_norms


class HoulsbyAdapters(nn.Module):
    """A bottleneck per task behind one sub-block: x + up(GELU(down(x))), initialized near the identity.

    Source: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP".
    """

    def __init__(self, inner: nn.Module, hidden: int, size: int, active: ActiveTask) -> None:
        super().__init__()
        self.inner = inner
        self._hidden, self._size, self._active = hidden, size, active
        self.tasks = nn.ModuleList()

    def add_task(self) -> None:
        """Append the bottleneck of the next task."""
        layers = nn.Sequential(nn.Linear(self._hidden, self._size), nn.GELU(), nn.Linear(self._size, self._hidden))
        for parameter in layers.parameters():
            nn.init.zeros_(parameter) if parameter.dim() == 1 else nn.init.trunc_normal_(parameter, std=0.01)
        self.tasks.append(layers)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the sub-block's output, passed through the active task's bottleneck: (B, L, H)."""
        x_BLH: Tensor = self.inner(*args, **kwargs)
        return x_BLH + self.tasks[self._active.task](x_BLH)


class AdapterClassifier(Classifier):
    """A frozen backbone with bottleneck adapters, norms and a head per task."""

    def __init__(self, backbone: PreTrainedModel, size: int, pooling: str | None = None) -> None:
        super().__init__(backbone, pooling)
        freeze(backbone)
        self.active = ActiveTask()
        self.adapters: list[HoulsbyAdapters] = []

        def adapter(inner: nn.Module) -> nn.Module:
            self.adapters.append(HoulsbyAdapters(inner, backbone.config.hidden_size, size, self.active))
            return self.adapters[-1]

        _, self.norms = insert_modules(backbone, self.active, adapter)

    def add_task(self, num_labels: int) -> None:
        """Append the adapters, norms and head of the next task."""
        parts: list[HoulsbyAdapters | TaskNorms] = [*self.adapters, *self.norms]
        for part in parts:
            part.add_task()
        self.add_head(num_labels)

    def start_task(self, task: int) -> None:
        """Make only the parameters of a task trainable."""
        freeze(self)
        owned = [adapters.tasks[task] for adapters in self.adapters] + [norms.norms[task] for norms in self.norms]
        for module in (*owned, self.heads[task]):
            module.requires_grad_(True)
        self.activate(task)

    def activate(self, task: int) -> None:
        """Select the task for the next forward passes."""
        self.task = self.active.task = task


class TaskEmbeddings(nn.Module):
    """A table of word embeddings per task that replaces the backbone's."""

    def __init__(self, base: nn.Embedding, active: ActiveTask) -> None:
        super().__init__()
        self.base, self._active = base, active
        self.tables = nn.ModuleList()

    def add_task(self) -> None:
        """Append the table of the next task, a copy of the backbone's."""
        self.tables.append(full_copy(self.base))

    @torch.no_grad()
    def inherit(self, task: int) -> None:
        """Initialize a task's table with the mean of the earlier tasks' tables."""
        earlier: list[Tensor] = [self.tables[number].get_parameter("weight") for number in range(task)]
        self.tables[task].get_parameter("weight").copy_(torch.stack(earlier).mean(0))

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return the active task's embeddings (B, L, H) of token ids (B, L)."""
        return self.tables[self._active.task](ids_BL)
