"""Task gates: one annealed, learned mask per task over the units of a layer.

Axes: U gated units.
Source: Serrà et al. 2018 (HAT), "Hard attention to the task". Ke et al. 2021 (CTR) gate their plugins the same way.
"""

from typing import Any

import torch
from torch import Tensor

LIMIT = 6.0
"""Gate embeddings act as if clamped to [-LIMIT, LIMIT], where sigmoid still has a usable gradient."""


def slope(step: int, cycle: int, s_max: float) -> float:
    """Return the gate slope at an optimizer step of an annealing cycle, rising from 1/s_max to s_max.

        s = 1/s_max + (s_max - 1/s_max) * step / (cycle - 1)

    Departs from the CTR release, which counts batches: its slope depends on the number of ranks and never arrives.

    Raises:
        ValueError: If step lies outside the cycle.
    """
    if not 0 <= step < cycle:
        raise ValueError(f"step={step}: expected 0 <= step < cycle={cycle}; is the counter reset at each cycle?")
    return 1.0 / s_max + (s_max - 1.0 / s_max) * step / max(cycle - 1, 1)


class Gate(torch.autograd.Function):
    """sigmoid(s * e), with the gradient of an un-annealed gate.

    dL/de = dL/dm * s_max * sigmoid(e) * (1 - sigmoid(e)): HAT's compensated gradient in closed form, independent of s.
    Outside [-LIMIT, LIMIT] a gradient that pushes further out is dropped. HAT clamps e after each step instead, which
    under ZeRO would need a collective per gate; both keep e in the range where it can still change sign.
    Shapes: (U,) -> (U,), float32 whatever the model's dtype, since 1 - sigmoid rounds to 0 in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, e_U: Tensor, s: float, s_max: float) -> Tensor:
        """Return the soft mask."""
        e_U = e_U.float()
        ctx.save_for_backward(e_U)
        ctx.s_max = s_max
        return torch.sigmoid(s * e_U.clamp(-LIMIT, LIMIT))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the compensated gradient."""
        (e_U,) = ctx.saved_tensors
        soft_U = torch.sigmoid(e_U.clamp(-LIMIT, LIMIT))
        grad_U = grads[0] * ctx.s_max * soft_U * (1.0 - soft_U)
        outward_U = ((e_U >= LIMIT) & (grad_U < 0)) | ((e_U <= -LIMIT) & (grad_U > 0))
        return grad_U.masked_fill(outward_U, 0.0), None, None


def binary(e_U: Tensor) -> Tensor:
    """Return the mask for evaluation and protection: 1 where e > 0, in float32."""
    return (e_U > 0).float()


def sparsity(masks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean use of units that no earlier task uses, over pairs (mask, used) of all gates.

        R = sum(m * (1 - M)) / sum(1 - M)

    m is the current task's mask, M the union of the earlier tasks' masks (used). Used units cost nothing, which makes
    a task share them. R is 0 if no unit is free.
    """
    new = torch.stack([(mask_U * (1.0 - used_U)).sum() for mask_U, used_U in masks]).sum()
    free = torch.stack([(1.0 - used_U).sum() for _, used_U in masks]).sum()
    return new / free.clamp(min=1.0)
