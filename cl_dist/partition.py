"""Access to parameters that ZeRO-3 may have partitioned over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has partitioned this parameter, in an engine or on loading; the same on every rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the full parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Gather the full values of a parameter that no engine trains, for the duration of the context.

    A collective if the parameter is partitioned.
    """
    if not is_partitioned(parameter):
        yield parameter.detach()
        return
    partitioned: Any = parameter
    partitioned.all_gather()
    try:
        yield partitioned.data
    finally:
        partitioned.partition()
