"""What all collections of encoded rows share: numbers from 0, an order by length, dummies, padding."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from cl_dist.data.sampler import DUMMY


class EncodedExamples(ABC):
    """Encoded rows, numbered through."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def length(self, number: int) -> int:
        """Return the tokens of a row."""

    def by_length(self, indices: Iterable[int] | None = None) -> list[int]:
        """Return row numbers, all unless some are given, from long to short: batches of neighbours need little padding.

        The largest batch comes first, so that memory that does not suffice is known at once.
        """
        chosen = range(len(self)) if indices is None else [int(index) for index in indices]
        return sorted(chosen, key=lambda index: (-self.length(index), index))

    def normalizers(self, indices: Collection[int]) -> dict[str, float]:
        """Return what the sums of a loss over these rows are divided by, by term: none but their number."""
        return {}


def real(indices: Iterable[int]) -> list[int]:
    """Return the rows that stand at some places: a dummy is encoded as the first row."""
    return [0 if index == DUMMY else int(index) for index in indices]


def weights(indices: Iterable[int]) -> Tensor:
    """Return how much each place of a batch counts: (B,) float32, 0 for dummies."""
    return torch.tensor([0.0 if index == DUMMY else 1.0 for index in indices])


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return rows filled up to the longest: (B, L)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
