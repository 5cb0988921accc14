"""CTR: CL-plugins with capsules, transfer routing and task masks in a frozen backbone.

Source: Ke et al. 2021, "Achieving Forgetting Prevention and Knowledge Transfer in Continual Learning", NeurIPS.
The mathematics is in models/gates, models/capsules and models/plugin; masks and their protection are HAT's
(methods/hat). This file says who trains the sharing parts, and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from cl_dist.methods.base import Loss, Method, Progress, TaskSequence, sequential_stages
from cl_dist.methods.hat import Hat, MaskedConfig
from cl_dist.models.config import PluginShape
from cl_dist.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from cl_dist.models.classifier import Batch


class CtrConfig(MaskedConfig, PluginShape):
    """Settings of CTR; the sizes of a plugin are those of PluginShape."""

    name: Literal["ctr"] = "ctr"
    mode: Literal["no_forgetting", "backward_transfer"] = "no_forgetting"
    """no_forgetting: everything an earlier task uses is frozen, so its logits stay bit-equal. backward_transfer (the
    paper): earlier capsules go on learning through open gates, so that earlier tasks may gain or lose."""


def plan(config: CtrConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train on the task, then score all seen ones, and the new one also without knowledge sharing."""
    train, score = sequential_stages(tasks, t)
    return [train, score.model_copy(update={"without": ("sharing",)}) if config.share else score]


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
        from cl_dist.models.noise import gumbel

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
        import torch

        gates = self.model.context.gates
        return {"gate_open": torch.stack([gate[:, :-1].cpu() for gate in gates], 1)} if gates else {}


METHOD = Method(
    config=CtrConfig,
    plan=plan,
    learners={"classifier": "cl_dist.methods.ctr:Ctr"},
    about="capsule CL-plugins with transfer routing and task masks in a frozen backbone",
    takes_quantized=True,
)
