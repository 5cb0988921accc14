"""Reading and setting whole parameters, whatever ZeRO has done to them.

Under ZeRO-1/2/3 the values that count are float32 masters, cut up over the ranks; `p.data` is a copy at best, empty at
worst. Everything here is a collective: every rank calls it with the same names in the same order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def read(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return whole float32 values on the CPU, one parameter at a time."""
    return {name: _read(parameter).detach().to("cpu", torch.float32, copy=True) for name, parameter in named.items()}


def _read(parameter: nn.Parameter) -> Tensor:
    if is_managed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


def add_gradient(parameter: nn.Parameter, gradient: Callable[[Tensor], Tensor], rank: int) -> None:
    """Add gradient(whole float32 value) to a parameter's reduced gradient, between the last backward and the step."""
    if is_managed(parameter):
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad, safe_set_local_grad

        whole = safe_get_full_grad(parameter) + gradient(_read(parameter))
        if hasattr(parameter, "ds_id"):
            safe_set_local_grad(parameter, _own_piece(parameter, whole, rank))
        else:
            safe_set_full_grad(parameter, whole)
    else:
        assert parameter.grad is not None
        parameter.grad += gradient(parameter.detach())


def write(values: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], rank: int) -> None:
    """Set the float32 masters of parameters that ZeRO holds: each rank the pieces that are its own.

    The parameters themselves follow at the next optimizer step; until then the two must round to the same values.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, value in values.items():
        parameter: Any = named[name]
        if hasattr(parameter, "ds_id"):
            safe_set_local_fp32_param(parameter, _own_piece(parameter, value, rank))
        else:
            safe_set_full_fp32_param(parameter, value)


def _own_piece(parameter: Any, value: Tensor, rank: int) -> Tensor:
    """Cut a rank's flat piece out of a whole value. DeepSpeed's setters cannot where the ranks do not divide it."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return F.pad(flat, (0, size - flat.numel()))


def is_managed(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO holds the master of this parameter; the same on every rank.

    ZeRO-1/2 set `_hp_mapping` on all trainable parameters, to None on ranks that own no piece: asking for its
    value here would let some ranks skip a collective.
    """
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def local(parameter: nn.Parameter, rank: int) -> tuple[Tensor, int]:
    """Return this rank's piece of a parameter, flat, and where in the parameter it begins. No collective.

    The float32 master where ZeRO holds one, else the parameter as the forward pass reads it. With ZeRO-1/2 a rank may
    own no piece; with ZeRO-3 the last piece may be filled up beyond the parameter's end.
    """
    managed: Any = parameter
    if hasattr(parameter, "ds_id"):
        if not parameter.requires_grad:
            return managed.ds_tensor, rank * managed.ds_tensor.numel()
        # The public call brings a copy to the device where the masters are with the host.
        piece, _ = managed._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        return piece, rank * managed.ds_tensor.numel()
    if hasattr(parameter, "_hp_mapping"):
        mapping = managed._hp_mapping
        if mapping is None:
            return parameter.new_empty(0, dtype=torch.float32), 0
        return mapping.hp_fragment, mapping.lp_fragment_address.start
    return parameter.detach().flatten(), 0
