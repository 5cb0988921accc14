"""Parameters of a model, of which ZeRO-3 may have cut some up over the ranks (DeepSpeed: partitioned)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has cut this parameter up, in an engine or while it was loaded; the same on every rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Give the whole values of a parameter that no engine trains, for as long as they are needed.

    A collective where it is cut up.
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
