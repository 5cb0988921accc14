"""Access to AdamW's moments under any ZeRO stage: in the state of the flat tensors of the float32 masters.

A rank has the moments of its partitions (params.local). A master's partition is a view into one of the optimizer's flat
tensors; its moments are at the same offset of that tensor's state.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_dist.parallel import params
from cl_dist.parallel.engine import Engine

KEYS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in torch's AdamW."""


def local(engine: Engine, parameter: nn.Parameter, key: str) -> tuple[Tensor, int]:
    """Return this rank's partition of a parameter's moment, as a view, and its offset in the parameter."""
    piece, start = params.local(parameter, engine.world.rank)
    if not piece.numel():
        return piece, start
    for flat in engine.flat_tensors:
        first = (piece.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= first < flat.numel():
            moment: Tensor = engine.optimizer.state[flat][key]
            return moment.view(-1)[first : first + piece.numel()], start
    raise AssertionError("a trained parameter is in none of the optimizer's tensors")


@torch.no_grad()
def restore(engine: Engine, step: int, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restore the state of an optimizer after `step` steps; moments[key] has full tensors by parameter name."""
    state: Any = engine.optimizer.state
    for flat in engine.flat_tensors:
        state[flat] = {"step": torch.tensor(float(step), device=flat.device)}
        state[flat] |= {key: torch.zeros_like(flat) for key in KEYS}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in KEYS:
                piece, start = local(engine, parameter, key)
                stored = moments[key][name].flatten()[start : start + piece.numel()]
                piece[: stored.numel()].copy_(stored)
    schedule = engine.schedule
    schedule.last_epoch = step
    for group, base in zip(engine.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule.lr_lambdas[0](step)
