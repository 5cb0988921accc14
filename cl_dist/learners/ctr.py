"""CTR: trains the capsules, routers and up-projections of plugins besides what HAT trains.

The mathematics is in models/gates, models/capsules and models/plugin.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_dist.learners.base import Loss, Progress
from cl_dist.learners.hat import Hat
from cl_dist.methods.ctr import CtrConfig
from cl_dist.models.classifier import Batch
from cl_dist.models.noise import gumbel
from cl_dist.parallel.seeds import seed_of


class Ctr(Hat):
    """Trains, besides what HAT trains, the task's capsules, router and up-projection."""

    config: CtrConfig

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Hat; with backward transfer earlier capsules are not frozen."""
        super().start_task(task, tasks)
        self.model.earlier = "routed"
        if self.config.mode == "backward_transfer":
            self.model.train_capsules(task)
        if task == 0:  # a task without predecessors has no gate to decide, so its router gets no gradient
            for sharing in self.model.sharings:
                for router in sharing.routers.values():
                    router.gate.requires_grad_(False)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return HAT's loss; the routers' noise falls to 0 once per round, until gates are decided as in scoring."""
        context, task = self.model.context, self.model.context.task
        key = seed_of(self.seed, "router", task)
        noise_PBU2 = gumbel(key, progress.step, batch["row"], len(self.model.plugins), task)
        noisy_steps = max(1, round(self.config.noise_share * progress.round_steps) - 1)
        context.noise_PBU2 = noise_PBU2 * max(0.0, 1 - progress.round_step / noisy_steps)
        context.share = True
        return super().loss(model, batch, progress)

    def learning_rates(self) -> Mapping[str, float]:
        """Knowledge sharing has a rate of its own, too."""
        rates = dict(super().learning_rates())
        if self.config.sharing_lr is not None:
            sharing = {id(parameter) for module in self.model.sharings for parameter in module.parameters()}
            own = [name for name, parameter in self.model.named_parameters() if id(parameter) in sharing]
            rates |= dict.fromkeys(own, self.config.sharing_lr)
        return rates

    def activate(self, task: int, without: str | None = None) -> None:
        """Score with binary masks and argmax routing.

        without: sharing switches the module off, earlier closes the gates of all earlier tasks' capsules, gates decides
        each of these gates by a coin.
        """
        super().activate(task)
        self.model.context.share = without != "sharing"
        self.model.earlier = {"earlier": "closed", "gates": "coin"}.get(without or "", "routed")

    def observe(self) -> dict[str, Tensor]:
        """Return the routers' decisions of the last batch: (B, P, U), U counting the earlier tasks."""
        gates = self.model.context.gates
        return {"gate_open": torch.stack([gate[:, :-1].cpu() for gate in gates], 1)} if gates else {}
