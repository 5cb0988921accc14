"""Reading and writing full parameters under any ZeRO stage.

Under ZeRO-1/2/3 the true values are float32 masters, partitioned over the ranks; `p.data` is a rounded copy or empty.
Functions are collectives unless stated otherwise: every rank calls them with the same names in the same order.
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
    """Load full values into a model before an engine takes it; parameters may have been partitioned on loading.

    Values are read one at a time. Not a collective.

    Raises:
        CheckpointError: If a shape does not match.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value, managed = values.get(name), cast("Any", parameter)
        if value is None:
            continue
        if value.shape != full_shape(parameter):
            raise CheckpointError(
                f"{name} is stored with shape {tuple(value.shape)}, but has {tuple(full_shape(parameter))} in the model"
            )
        if is_partitioned(parameter):
            managed.ds_tensor.copy_(_own_shard(managed, value, rank))
        else:
            managed.copy_(value)


def lower(parameter: nn.Parameter) -> None:
    """Round a parameter to bfloat16, partitioned or not. Not a collective."""
    parameter.data = parameter.data.to(torch.bfloat16)
    if is_partitioned(parameter):
        managed: Any = parameter
        rounded = managed.ds_tensor.data.to(torch.bfloat16)
        managed.ds_tensor.data = rounded.pin_memory() if managed.ds_tensor.is_pinned() else rounded


class Fp32Snapshot:
    """References to float32 parameters before an engine rounds them; no copies."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._snapshots: list[tuple[Any, Tensor, bool]] = []
        for parameter in named.values():
            managed: Any = parameter
            partitioned = is_partitioned(parameter)
            self._snapshots.append((parameter, (managed.ds_tensor if partitioned else managed).detach(), partitioned))

    @torch.no_grad()
    def put_back(self, rank: int) -> None:
        """Copy the values to the float32 masters. A collective.

        The parameters themselves are updated at the next optimizer step; until then both round to the same values.
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
    """Add gradient(full float32 value) to a parameter's reduced gradient, between the last backward and the step."""
    if is_managed(parameter):
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad, safe_set_local_grad

        full = safe_get_full_grad(parameter) + gradient(_read(parameter))
        if is_partitioned(parameter):
            safe_set_local_grad(parameter, _own_shard(parameter, full, rank))
        else:
            safe_set_full_grad(parameter, full)
    else:
        assert parameter.grad is not None
        parameter.grad += gradient(parameter.detach())


def _own_shard(parameter: Any, value: Tensor, rank: int) -> Tensor:
    """Return a rank's flat partition of a full value. DeepSpeed's setters fail if the ranks do not divide its size."""
    size = parameter.ds_tensor.ds_numel  # not numel(): a partition in a file has a placeholder tensor
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return F.pad(flat, (0, size - flat.numel()))


def is_managed(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO has the master of this parameter; the same on every rank. Not a collective.

    ZeRO-1/2 set `_hp_mapping` on all trainable parameters, to None on ranks without a partition of it: testing its
    value here would make some ranks skip a collective.
    """
    return hasattr(parameter, "_hp_mapping") or is_partitioned(parameter)


def local(parameter: nn.Parameter, rank: int) -> tuple[Tensor, int]:
    """Return this rank's flat partition of a parameter and its offset in the parameter. Not a collective.

    The float32 master if ZeRO has one, else the parameter as the forward pass reads it, or a copy from its file.
    With ZeRO-1/2 a rank's partition may be empty; with ZeRO-3 the last partition may be padded.
    """
    managed: Any = parameter
    if is_partitioned(parameter):
        if not parameter.requires_grad:
            return files.read(managed), rank * managed.ds_tensor.ds_numel
        # With offloaded masters the public call returns a copy on the device.
        piece, _ = managed._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        return piece, rank * managed.ds_tensor.ds_numel
    if hasattr(parameter, "_hp_mapping"):
        mapping = managed._hp_mapping
        if mapping is None:
            return parameter.new_empty(0, dtype=torch.float32), 0
        return mapping.hp_fragment, mapping.lp_fragment_address.start
    return parameter.detach().flatten(), 0
