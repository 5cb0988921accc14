"""Reading and setting whole parameters, whatever ZeRO has done to them.

Under ZeRO-1/2/3 the values that count are float32 masters, cut up over the ranks; `p.data` is a copy at best, empty at
worst. What is no collective says so; the rest every rank calls with the same names in the same order.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_dist.errors import CheckpointError
from cl_dist.parallel import files
from cl_dist.partition import full_shape, is_partitioned


@torch.no_grad()
def load(model: nn.Module, values: Mapping[str, Tensor], rank: int) -> None:
    """Put whole values into a model that no engine has yet; parts of it may have been cut up while it was loaded.

    Values are asked for one after the other. No collective.

    Raises:
        CheckpointError: If a value has another shape.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value, managed = values.get(name), cast("Any", parameter)
        if value is None:
            continue
        if value.shape != full_shape(parameter):
            raise CheckpointError(
                f"{name} is stored as {tuple(value.shape)}, the model has {tuple(full_shape(parameter))}"
            )
        if is_partitioned(parameter):
            managed.ds_tensor.copy_(_own_shard(managed, value, rank))
        else:
            managed.copy_(value)


def lower(parameter: nn.Parameter) -> None:
    """Round a parameter to bfloat16, cut up or not. No collective."""
    parameter.data = parameter.data.to(torch.bfloat16)
    if is_partitioned(parameter):
        managed: Any = parameter
        rounded = managed.ds_tensor.data.to(torch.bfloat16)
        managed.ds_tensor.data = rounded.pin_memory() if managed.ds_tensor.is_pinned() else rounded


class Fp32Snapshot:
    """What parameters are in float32 before an engine takes them, which rounds them; no copy of them."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._snapshots: list[tuple[Any, Tensor, bool]] = []
        for parameter in named.values():
            managed: Any = parameter
            partitioned = is_partitioned(parameter)
            self._snapshots.append((parameter, (managed.ds_tensor if partitioned else managed).detach(), partitioned))

    @torch.no_grad()
    def put_back(self, rank: int) -> None:
        """Set the float32 masters to it. A collective.

        The parameters themselves follow at the next optimizer step; until then the two round to the same values.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value, was_partitioned in self._snapshots:
            if is_partitioned(parameter):
                local(parameter, rank)[0].copy_(value if was_partitioned else _own_shard(parameter, value, rank))
            else:
                safe_set_full_fp32_param(parameter, value)
        self._snapshots = []


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
        if is_partitioned(parameter):
            safe_set_local_grad(parameter, _own_shard(parameter, whole, rank))
        else:
            safe_set_full_grad(parameter, whole)
    else:
        assert parameter.grad is not None
        parameter.grad += gradient(parameter.detach())


def _own_shard(parameter: Any, value: Tensor, rank: int) -> Tensor:
    """Cut a rank's flat piece out of a whole value. DeepSpeed's setters cannot where the ranks do not divide it."""
    size = parameter.ds_tensor.ds_numel  # where it lies in a file, its tensor is another one
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return F.pad(flat, (0, size - flat.numel()))


def is_managed(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO holds the master of this parameter; the same on every rank. No collective.

    ZeRO-1/2 set `_hp_mapping` on all trainable parameters, to None on ranks that own no piece: asking for its
    value here would let some ranks skip a collective.
    """
    return hasattr(parameter, "_hp_mapping") or is_partitioned(parameter)


def local(parameter: nn.Parameter, rank: int) -> tuple[Tensor, int]:
    """Return this rank's piece of a parameter, flat, and where in the parameter it begins. No collective.

    The float32 master where ZeRO holds one, else the parameter as the forward pass reads it, or a copy from its file.
    With ZeRO-1/2 a rank may own no piece; with ZeRO-3 the last piece may be filled up beyond the parameter's end.
    """
    managed: Any = parameter
    if is_partitioned(parameter):
        if not parameter.requires_grad:
            return files.read(managed), rank * managed.ds_tensor.ds_numel
        # The public call brings a copy to the device where the masters are with the host.
        piece, _ = managed._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        return piece, rank * managed.ds_tensor.ds_numel
    if hasattr(parameter, "_hp_mapping"):
        mapping = managed._hp_mapping
        if mapping is None:
            return parameter.new_empty(0, dtype=torch.float32), 0
        return mapping.hp_fragment, mapping.lp_fragment_address.start
    return parameter.detach().flatten(), 0
