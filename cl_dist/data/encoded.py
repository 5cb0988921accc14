"""Collections of encoded rows, numbered from 0 over all tasks: lazy encoding, order by length, dummies and padding."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_dist.data.rows import Row, TaskData
from cl_dist.data.sampler import DUMMY

Tokens = NDArray[np.int32]
CACHED = 65_536
"""Encoded rows that a collection caches: about 50 MB with rows of 128 tokens."""


class EncodedExamples(ABC):
    """Encoded rows, numbered consecutively."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def length(self, number: int) -> int:
        """Return the number of tokens of a row."""

    def by_length(self, indices: Iterable[int] | None = None) -> list[int]:
        """Return row numbers (default: all) from the longest row to the shortest, which minimizes padding in batches.

        The largest batch comes first, so that a lack of memory shows at once.
        """
        chosen = range(len(self)) if indices is None else [int(index) for index in indices]
        return sorted(chosen, key=lambda index: (-self.length(index), index))

    def normalizers(self, indices: Collection[int]) -> dict[str, float]:
        """Return the divisors of loss terms, by term, over these rows; by default the number of rows for all terms."""
        return {}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows added in one call."""

    task: int
    data: TaskData
    rows: Sequence[Row]
    max_length: int
    replayed: bool


E = TypeVar("E")


class LazyExamples(EncodedExamples, Generic[E]):
    """Rows encoded on demand, so that a collection starts in constant time and memory.

    Recently used rows stay encoded. Thread-safe for readers.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._ends: list[int] = []
        """Number of rows up to and including each part."""
        self._cache: OrderedDict[int, E] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _append(self, part: Part) -> None:
        self._parts.append(part)
        self._ends.append(len(self) + len(part.rows))

    @abstractmethod
    def _encode(self, part: Part, rows: Sequence[Row]) -> list[E]:
        """Encode some rows of a part, in order."""

    def encoded(self, numbers: Sequence[int]) -> list[E]:
        """Return the rows of these numbers, encoded."""
        with self._lock:
            found = {number: self._cache[number] for number in numbers if number in self._cache}
            absent: dict[int, list[int]] = {}
            for number in dict.fromkeys(numbers):
                if number not in found:
                    absent.setdefault(bisect_right(self._ends, number), []).append(number)
            for at, missing in absent.items():
                part, first = self._parts[at], self._ends[at - 1] if at else 0
                rows = [part.rows[number - first] for number in missing]
                found |= zip(missing, self._encode(part, rows), strict=True)
            for number, example in found.items():
                self._cache[number] = example
                self._cache.move_to_end(number)
            while len(self._cache) > max(CACHED, len(found)):
                self._cache.popitem(last=False)
            return [found[number] for number in numbers]

    def part(self, number: int) -> Part:
        """Return the part of a row."""
        return self._parts[bisect_right(self._ends, number)]


def real(indices: Iterable[int]) -> list[int]:
    """Return row numbers with 0 for dummies: a dummy is encoded as the first row."""
    return [0 if index == DUMMY else int(index) for index in indices]


def weights(indices: Iterable[int]) -> Tensor:
    """Return the weight of each example of a batch: (B,) float32, 0 for dummies."""
    return torch.tensor([0.0 if index == DUMMY else 1.0 for index in indices])


def padded(rows: Sequence[Any], fill: int) -> Tensor:
    """Return rows of tokens padded to the longest: (B, L) int64."""
    longest = max(len(row) for row in rows)
    filled = np.full((len(rows), longest), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return torch.from_numpy(filled)
