"""CTR: trains the capsules, routers and up-projections of plugins besides what HAT trains.

The mathematics is in models/gates, models/capsules and models/plugin.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_dist.learners.base import Loss, Progress
from cl_dist.learners.hat import Hat
from cl_dist.methods.ctr import CtrConfig
from cl_dist.models.classifier import Batch
from cl_dist.models.noise import gumbel


class Ctr(Hat):
    """Trains, besides what HAT trains, the task's capsules, router and up-projection."""

    config: CtrConfig

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Hat; with backward transfer earlier capsules are not frozen."""
        super().start_task(task, tasks)
        if self.config.mode == "backward_transfer":
            self.model.train_capsules(task)
        if task == 0:  # a task without predecessors has no gate to decide, so its router gets no gradient
            for sharing in self.model.sharings:
                for router in sharing.routers.values():
                    router.gate.requires_grad_(False)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return HAT's loss; the routers' noise falls to 0 once per round, until gates are decided as in scoring."""
        context, task = self.model.context, self.model.context.task
        noise_PBU2 = gumbel(self.seed, progress.step, batch["row"], len(self.model.plugins), task)
        context.noise_PBU2 = noise_PBU2 * (1 - progress.round_step / max(1, progress.round_steps - 1))
        context.share = True
        return super().loss(model, batch, progress)

    def activate(self, task: int, without: str | None = None) -> None:
        """Score with binary masks and argmax routing."""
        super().activate(task)
        self.model.context.noise_PBU2 = None
        self.model.context.share = without != "sharing"

    def observe(self) -> dict[str, Tensor]:
        """Return the routers' decisions of the last batch: (B, P, U), U counting the earlier tasks."""
        gates = self.model.context.gates
        return {"gate_open": torch.stack([gate[:, :-1].cpu() for gate in gates], 1)} if gates else {}
