"""Splits by a hash of the row id, stratified by label."""

import hashlib
import math
from collections.abc import Iterable, Sequence

from cl_dist.data.tasks import Split

TOLERANCE = 1 / 3
"""Largest deviation of a label's rows in dev or test from its fraction, in parts of the smaller fraction."""


def hashed_splits(rows: Sequence[tuple[str, str]], split: Split) -> list[str]:
    """Return the split of each (id, label).

    The hash of an id is a number in [0, 1). Below `split.train` the row is a train row, below `split.train + split.dev`
    a dev row, else a test row. For each label, the number of rows in test, then in dev, is kept within

        n * fraction -+ TOLERANCE * n * (the smaller fraction of dev and test that is above 0)

    n being the label's rows: rows whose hash is nearest to a boundary cross it until the numbers fit. A label with
    three rows or more has at least one in each split (dev: unless its fraction is 0); with two, one in train and one in
    test; a single row is a train row. Equal ids of a label stay together.

    The result is a function of ids and labels, and of neither the order of rows nor the rows of other labels. Another
    row of a label moves no row while the numbers fit, which in a large label is almost always, else one row across the
    boundary of test and two across that of dev at most.
    """
    by_label: dict[str, dict[str, float]] = {}
    for row_id, label in rows:
        by_label.setdefault(label, {})[row_id] = _number(row_id)
    assigned = {label: _assigned(numbers, split) for label, numbers in by_label.items()}
    return [assigned[label][row_id] for row_id, label in rows]


def _number(row_id: str) -> float:
    """Return the hash of an id as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:6], "big") / 2**48


def _assigned(numbers: dict[str, float], split: Split) -> dict[str, str]:
    """Return the split of each id of one label, given the numbers of the ids."""
    ids = sorted(numbers, key=lambda row_id: (numbers[row_id], row_id))
    num, shares = len(ids), {"dev": split.dev, "test": 1 - split.train - split.dev}
    slack = TOLERANCE * num * min(share for share in shares.values() if share > 0)
    most = num - 1 - (split.dev > 0 and num > 2)  # leaves a train row, and a dev row
    test = _fitted(_count(numbers.values(), split.train + split.dev, 1.0), num * shares["test"], slack, most)
    dev = 0
    if split.dev > 0:
        dev = _fitted(
            _count(numbers.values(), split.train, split.train + split.dev), num * split.dev, slack, num - 1 - test
        )
    train = num - test - dev
    return {row_id: "train" if k < train else "dev" if k < train + dev else "test" for k, row_id in enumerate(ids)}


def _count(numbers: Iterable[float], low: float, high: float) -> int:
    return sum(low <= number < high for number in numbers)


def _fitted(count: int, wanted: float, slack: float, most: int) -> int:
    """Return the number next to `count` that is within `slack` of `wanted`, at least 1, and at most `most`."""
    least = max(1, math.ceil(wanted - slack))
    return min(max(count, least), max(least, math.floor(wanted + slack)), most)
