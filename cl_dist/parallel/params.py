"""Reading whole parameters, whatever ZeRO has done to them.

Under ZeRO-1/2/3 the values that count are float32 masters, cut up over the ranks; `p.data` is a copy at best, empty at
worst. Everything here is a collective: every rank calls it with the same names in the same order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def read(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return whole float32 values on the CPU, one parameter at a time."""
    return {name: _read(parameter).detach().to("cpu", torch.float32, copy=True) for name, parameter in named.items()}


def _read(parameter: nn.Parameter) -> Tensor:
    if is_managed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def is_managed(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO holds the master of this parameter; the same on every rank.

    ZeRO-1/2 set `_hp_mapping` on all trainable parameters, to None on ranks that own no piece: asking for its
    value here would let some ranks skip a collective.
    """
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
