"""CTR: CL-plugins with capsules, transfer routing and task masks in a frozen backbone.

Source: Ke et al. 2021, "Achieving Forgetting Prevention and Knowledge Transfer in Continual Learning", NeurIPS.
The mathematics is in models/gates, models/capsules and models/plugin; this file says who trains what, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cl_dist.methods.base import Learner, Loss, Method, MethodConfig, Progress, TaskSequence, score_seen
from cl_dist.models.config import PluginShape
from cl_dist.stage import Stage, Train, model_after

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cl_dist.models.classifier import Batch
    from cl_dist.models.plugin import CtrClassifier
    from cl_dist.parallel.engine import GradScale


class CtrConfig(MethodConfig, PluginShape):
    """Settings of CTR; the sizes of a plugin are those of PluginShape."""

    name: Literal["ctr"] = "ctr"
    mode: Literal["no_forgetting", "backward_transfer"] = "no_forgetting"
    """no_forgetting: everything an earlier task uses is frozen, so its logits stay bit-equal. backward_transfer (the
    paper): earlier capsules go on learning through open gates, so that earlier tasks may gain or lose."""
    sparsity: float = Field(0.75, ge=0)
    """Weight of the term that keeps units free for later tasks."""
    gate_lr: float | None = Field(None, gt=0)
    """Learning rate of the gate embeddings; None takes train.lr."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of the task's head; None takes train.lr."""
    share: bool = True
    """Knowledge sharing (KSM); False is the ablation that leaves masks only (HAT on adapters)."""


def plan(config: CtrConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train on the task, then score all seen ones, and the new one also without knowledge sharing."""
    init = model_after(t - 1) if t else None
    return [Train(task=t, data=(t,), init=init), score_seen(t, without=("sharing",) if config.share else ())]


class Ctr(Learner):
    """Trains the plugins' shared layers where no earlier task uses them, and the task's own parts."""

    config: CtrConfig
    model: CtrClassifier

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner."""
        from cl_dist.models.plugin import CtrClassifier

        self.model = CtrClassifier(backbone, self.config, self.pooling)
        for count in self.num_labels:
            self.model.add_task(count)
        return self.model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Start the task's router, up-projection, routing row and norms from its predecessor's; freeze the rest."""
        if task:
            self.model.inherit(task)
        self.model.start_task(task, backward_transfer=self.config.mode == "backward_transfer")
        self.model.context.share = self.config.share
        if not self.config.share:  # parameters that no forward pass reaches have no gradient and would not be trained
            for plugin in self.model.plugins:
                plugin.sharing.requires_grad_(False)
        elif task == 0:  # a task without predecessors has no gate to decide, so its router gets no gradient
            for plugin in self.model.plugins:
                for router in plugin.sharing.routers.values():
                    router.gate.requires_grad_(False)

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return cross-entropy per row and the sparsity of the task's masks.

        Once per round the mask slope rises to s_max and the routers' noise falls to 0, so that a round ends under the
        conditions of scoring: binary masks, and gates decided by argmax.
        """
        from cl_dist.models.classifier import cross_entropy
        from cl_dist.models.gates import slope
        from cl_dist.models.noise import gumbel

        context, task = self.model.context, self.model.context.task
        context.slope = slope(progress.round_step, progress.round_steps, self.config.s_max)
        noise_PBU2 = gumbel(self.seed, progress.step, batch["row"], len(self.model.plugins), task)
        context.noise_PBU2 = noise_PBU2 * (1 - progress.round_step / max(1, progress.round_steps - 1))
        logits_BK = model(batch)
        own = {"sparsity": self.config.sparsity * self.model.sparsity()}
        return Loss(rows={"ce": cross_entropy(logits_BK, batch)}, own=own)

    def activate(self, task: int, without: str | None = None) -> None:
        """Score with binary masks and argmax routing."""
        self.model.activate(task)
        self.model.context.slope = None
        self.model.context.noise_PBU2 = None
        self.model.context.share = self.config.share and without != "sharing"

    def grad_scales(self) -> Mapping[str, GradScale]:
        """Protect the units that earlier tasks use; bring gate gradients to the scale of the others.

        A unit of the first layer is kept whole; a weight of the second is kept where both its ends are used. Gate
        gradients are s_max / 4 times the others', which would leave the clipped norm to them alone; Adam is invariant
        to the constant that is taken out here.
        """
        from cl_dist.parallel.engine import GradScale

        scales: dict[str, GradScale] = {}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        task = self.model.context.task
        for plugin in self.model.plugins:
            used1, used2 = plugin.used(task)
            if task:
                scales[names[plugin.fc1.weight]] = scales[names[plugin.fc1.bias]] = GradScale(row=1 - used1)
                scales[names[plugin.fc2.weight]] = GradScale(row=1 - used2, column=1 - used1)
                scales[names[plugin.fc2.bias]] = GradScale(row=1 - used2)
            for gate in plugin.gates(task):
                scales[names[gate]] = GradScale(scale=1 / self.config.s_max)
        return scales

    def learning_rates(self) -> Mapping[str, float]:
        """Gates and heads may have their own rates."""
        rates = {}
        for name, _ in self.model.named_parameters():
            if self.config.gate_lr is not None and (".gate1_" in name or ".gate2_" in name):
                rates[name] = self.config.gate_lr
            if self.config.head_lr is not None and name.startswith("heads."):
                rates[name] = self.config.head_lr
        return rates

    def end_task(self, masters: Mapping[str, Tensor]) -> None:
        """Binarise the task's masks from the float32 gate embeddings."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        pairs = [plugin.gates(self.model.context.task) for plugin in self.model.plugins]
        self.model.finish_task([(masters[names[gate1]], masters[names[gate2]]) for gate1, gate2 in pairs])

    def facts(self) -> dict[str, Any]:
        """Return each plugin's mask use, sharing with earlier tasks, and free units, as shares of its units."""
        task, plugins = self.model.context.task, self.model.plugins
        return {
            "layers": self.model.plugin_names,
            "units": [[p.mask1.shape[1], p.mask2.shape[1]] for p in plugins],
            "mask_use": [[_mean(m[task]) for m in (p.mask1, p.mask2)] for p in plugins],
            "mask_shared": [[_shared(m, task) for m in (p.mask1, p.mask2)] for p in plugins],
            "free_units": [[1 - _mean(m.any(0)) for m in (p.mask1, p.mask2)] for p in plugins],
        }

    def observe(self) -> dict[str, Tensor]:
        """Return the routers' decisions of the last batch: (B, P, U), U counting the earlier tasks."""
        import torch

        gates = self.model.context.gates
        return {"gate_open": torch.stack([gate[:, :-1] for gate in gates], 1)} if gates else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the binary masks of all finished tasks."""
        return self.model.masks()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the binary masks."""
        self.model.load_masks(dict(state))


def _mean(mask_U: Tensor) -> float:
    return float(mask_U.float().mean())


def _shared(mask_TU: Tensor, task: int) -> float:
    """Return the share of a task's units that an earlier task uses too."""
    own = mask_TU[task]
    return float((own & mask_TU[:task].any(0)).sum() / own.sum().clamp(min=1))


METHOD = Method(
    config=CtrConfig,
    plan=plan,
    learners={"main": "cl_dist.methods.ctr:Ctr"},
    about="capsule CL-plugins with transfer routing and task masks in a frozen backbone",
)
