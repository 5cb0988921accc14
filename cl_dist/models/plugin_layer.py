"""CL-plugin of CTR: knowledge sharing, then a gated task-specific module, after a sub-block of a frozen backbone.

Axes: B rows, L tokens, H hidden units, A units of the task-specific module, U seen tasks, P plugins.
Source: Ke et al. 2021 (CTR), sections 3-4. One plugin wraps each sub-block, before the residual sum and norm:
    h = x + KSM(x);  k1 = ReLU(W1 h + b1) * m1;  k2 = ReLU(W2 k1 + b2) * m2;  Plugin(x) = x + k2
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_dist.models.capsules import Sharing
from cl_dist.models.config import MaskShape, PluginShape
from cl_dist.models.gates import Gate, binary
from cl_dist.models.task_modules import ActiveTask
from cl_dist.partition import full_shape

MASKS = ("mask1", "mask2")


@dataclass
class Context(ActiveTask):
    """State of a forward pass that all plugins need besides the hidden states; one object, shared by all plugins."""

    slope: float | None = None
    """Slope of the gates during training; None uses binary masks."""
    share: bool = True
    """Whether knowledge sharing is on; False is the ablation."""
    plain: bool = False
    """Whether plugins pass the sub-blocks' outputs on unchanged: the backbone alone."""
    fixed_PBU: Tensor | None = None
    """Gates of earlier tasks' capsules, 0 or 1, in place of the routers' decisions: an ablation."""
    noise_PBU2: Tensor | None = None
    """Gumbel noise of the routers; None decides by argmax."""
    token_mask_BL: Tensor | None = None
    masks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Written by a forward pass in training: (mask, union of earlier masks) of every gate, for the sparsity term."""
    gates: list[Tensor] = field(default_factory=list)
    """Written by a forward pass: decisions (B, U) of each plugin's router."""


class Plugin(nn.Module):
    """The plugin of one sub-block. All tasks share its two layers; gates select the units that a task uses."""

    mask1: Tensor
    mask2: Tensor

    def __init__(self, inner: nn.Module, hidden: int, shape: MaskShape, context: Context, index: int) -> None:
        super().__init__()
        self.inner = inner
        self.shape, self.context, self.index = shape, context, index
        self.num_tasks = 0
        self.sharing = Sharing(shape, hidden) if isinstance(shape, PluginShape) and shape.share else None
        self.fc1 = nn.Linear(hidden, shape.tsm_size)
        self.fc2 = nn.Linear(shape.tsm_size, hidden)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        # Binary masks of finished tasks, one row per task: buffers, so nothing can train them.
        self.register_buffer("mask1", torch.zeros(0, shape.tsm_size, dtype=torch.bool), persistent=False)
        self.register_buffer("mask2", torch.zeros(0, hidden, dtype=torch.bool), persistent=False)
        self.protected: int | None = None
        """The task in training that earlier tasks are protected from; None without protection."""
        self._protected_values: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(_protect_loaded)  # type: ignore[no-untyped-call]

    def add_task(self) -> None:
        """Append the gates and sharing parts of the next task."""
        task = self.num_tasks
        if self.sharing is not None:
            self.sharing.add_task()
        for number, layer in ((1, self.fc1), (2, self.fc2)):
            gate = torch.empty(layer.out_features).normal_(self.shape.mask_mean, self.shape.mask_std)
            self.register_parameter(f"gate{number}_{task}", nn.Parameter(gate))
        self.num_tasks += 1

    def gates(self, task: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the two gate embeddings (A,) and (H,) of a task."""
        return getattr(self, f"gate1_{task}"), getattr(self, f"gate2_{task}")

    def used(self, task: int) -> tuple[Tensor, Tensor]:
        """Return which units the tasks before `task` use, as float32 masks (A,) and (H,)."""
        return self.mask1[:task].any(0).float(), self.mask2[:task].any(0).float()

    def shared(self, task: int) -> dict[str, tuple[Tensor, ...]]:
        """Return the rows, and columns of fc2.weight, of the shared layers that earlier tasks use, by parameter.

        A used unit of fc1 is protected entirely, an entry of fc2.weight if its row and its column are used.
        """
        used1_A, used2_H = self.used(task)
        return {
            "fc1.weight": (used1_A,),
            "fc1.bias": (used1_A,),
            "fc2.weight": (used2_H, used1_A),
            "fc2.bias": (used2_H,),
        }

    def protect(self, task: int) -> None:
        """Protect the entries of the shared layers that earlier tasks use while `task` trains, with any optimizer.

        Their gradients are set to zero. Weight decay and momentum change weights without a gradient, so the values are
        also restored before they are used: in each forward pass and in `state_dict`. The gradients of gates are
        s_max / 4 times larger than those of other parameters; they are scaled down, so as not to dominate clipping.
        """
        self.release()
        self.protected = task
        for gate in self.gates(task):
            self._hooks.append(gate.register_hook(partial(torch.mul, other=1 / self.shape.s_max)))
        for name, used in self.shared(task).items():
            parameter, (rows, *columns) = self.get_parameter(name), [used_U.nonzero()[:, 0] for used_U in used]
            if rows.numel():
                index = (rows[:, None], *columns) if columns else (rows,)
                self._protected_values[name] = index, parameter.detach()[index].clone()
                self._hooks.append(parameter.register_hook(partial(_zeroed, index=index)))

    def restore(self) -> None:
        """Restore the values saved by `protect`.

        Raises:
            ValueError: If ZeRO-3 has partitioned the parameters.
        """
        for name, (index, values) in self._protected_values.items():
            parameter = self.get_parameter(name)
            if parameter.shape != full_shape(parameter):
                raise ValueError(
                    f"{name}: start_task(protect=True) needs full parameters, but ZeRO-3 has partitioned them; train "
                    "with cl-dist, or with ZeRO-1 or 2"
                )
            # .data: the same bits are written between the forward passes of one step, and autograd must not count that
            # as a change. The model may have been moved to another device or dtype since.
            parameter.data[index] = values.to(parameter)

    def release(self) -> None:
        """End the protection."""
        for hook in self._hooks:
            hook.remove()
        self.protected, self._protected_values, self._hooks = None, {}, []

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mask1.shape[0]:
            destination |= {f"{prefix}{name}": getattr(self, name) for name in MASKS}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in MASKS:
            if (mask := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, mask.to(getattr(self, name).device, torch.bool, copy=True))
        rest = {name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in MASKS}
        super()._load_from_state_dict(rest, prefix, *args)

    def _masks(self) -> tuple[Tensor, Tensor]:
        task, s, s_max = self.context.task, self.context.slope, self.shape.s_max
        if task < self.mask1.shape[0]:
            return self.mask1[task].float(), self.mask2[task].float()
        gate1, gate2 = self.gates(task)
        if s is None:
            return binary(gate1), binary(gate2)
        masks = Gate.apply(gate1, s, s_max), Gate.apply(gate2, s, s_max)
        self.context.masks.extend(zip(masks, self.used(task), strict=True))
        return masks

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the sub-block's output with the plugin's contribution added: (B, L, H)."""
        x_BLH: Tensor = self.inner(*args, **kwargs)
        if self.context.plain:
            return x_BLH
        self.restore()
        context, h_BLH = self.context, x_BLH
        if context.share and self.sharing is not None:
            assert context.token_mask_BL is not None  # set by CtrClassifier.forward
            noise_BU2 = None if context.noise_PBU2 is None else context.noise_PBU2[self.index]
            fixed_BU = None if context.fixed_PBU is None else context.fixed_PBU[self.index]
            mask_BL = context.token_mask_BL.to(x_BLH.device)
            shared_BLH, delta_BU = self.sharing(x_BLH, context.task, mask_BL, noise_BU2, fixed_BU)
            h_BLH = x_BLH + shared_BLH
            if delta_BU is not None:
                context.gates.append(delta_BU.detach())
        mask1_A, mask2_H = (mask.to(x_BLH.dtype) for mask in self._masks())
        k1_BLA = F.relu(self.fc1(h_BLH)) * mask1_A
        k2_BLH = F.relu(self.fc2(k1_BLA)) * mask2_H
        return x_BLH + k2_BLH


def _zeroed(grad: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    return grad.index_put(index, grad.new_zeros(()))


def _protect_loaded(plugin: Plugin, _: object) -> None:
    """Protect the loaded values instead of the previous ones."""
    if plugin.protected is not None:
        plugin.protect(plugin.protected)
