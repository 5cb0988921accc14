"""Counter-based noise: a function of the sampled item, never of rank, process or batch.

Axes: B rows, P plugins, U earlier tasks; the last axis holds the two logits of a gate (open, closed).
"""

import torch
from torch import Tensor

_MASK_31, _MASK_63 = (1 << 31) - 1, (1 << 63) - 1


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values (the finaliser of SplitMix64; products wrap, shifts are made logical)."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key_B: Tensor, step_B: Tensor) -> Tensor:
    """Return numbers in (0, 1) keyed on (key, step): (B,) float64."""
    bits = _shift(_mix(_mix(key_B) + step_B * -7046029254386353131), 33) & _MASK_31
    return (bits.to(torch.float64) + 0.5) / float(1 << 31)


def gumbel(seed: int, step: int, row_B: Tensor, num_plugins: int, num_tasks: int) -> Tensor:
    """Return Gumbel(0, 1) noise keyed on (seed, optimizer step, row number, plugin, earlier task, logit).

    The same row at the same step gets the same noise on any rank, in any micro-batch, at any position.

    Shapes: row_B int64 -> (P, B, U, 2) float32.
    """
    device = row_B.device
    word = (seed * 0x9E3779B1 + step) & _MASK_63  # a seed may be of any size
    key = _mix(torch.tensor(word, dtype=torch.int64, device=device))
    row = _mix(row_B.to(torch.int64) ^ key)[None, :, None, None]
    plugin = torch.arange(num_plugins, device=device)[:, None, None, None]
    task = torch.arange(num_tasks, device=device)[None, None, :, None]
    logit = torch.arange(2, device=device)[None, None, None, :]
    bits = _shift(_mix(row + ((plugin << 32) | (task << 8) | logit) * -7046029254386353131), 33) & _MASK_31
    uniform = (bits.to(torch.float64) + 0.5) / float(1 << 31)  # strictly inside (0, 1)
    return -torch.log(-torch.log(uniform)).float()
