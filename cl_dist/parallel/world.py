"""Rank, size and device of a process in a gang."""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """Rank, number of ranks, and the device of this rank."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> "World":
        """Return this process's rank in the gang; rank 0 of 1 if torch.distributed is not initialised."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            return cls(rank, size, torch.device("cuda", local % torch.cuda.device_count()))
        return cls(rank, size, torch.device("cpu"))

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's tensor, on every rank; value is overwritten."""
        if self.size > 1:
            dist.all_reduce(value)
        return value
