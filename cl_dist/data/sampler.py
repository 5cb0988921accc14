"""Exact sampler: the rows of a step, independent of workers, micro-batch size and interruptions.

With N rows and a global batch of B, an epoch has S = ceil(N / B) steps. Step s, of epoch e = s // S, takes

    G_s = p_e[k * B : (k + 1) * B],   k = s mod S,   p_e = argsort(Philox(sha256(seed, task, e)))

a function of the step number alone: there is no generator state to save, so a resume continues the permutation, on
any number of ranks. The last batch of an epoch is short, not padded or dropped. Of G_s, rank r of R takes
G_s[r::R], split into M micro-batches of m rows, padded with -1:

    M = ceil(ceil(B / R) / m)

M depends on B, not on the length of G_s, so all ranks run the same number of collectives in every step, even if
a short batch leaves a rank without rows. A -1 is a dummy row of weight 0, and the loss is
(sum of weighted losses over all ranks) / (sum of weights over all ranks). Each row of G_s then counts once, and
32 rows on 3 ranks (11 + 11 + 10, and a dummy) equal 32 rows on 1; a mean of the three ranks' means would not.
"""

import hashlib
import json
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
DUMMY = -1
"""Index of a dummy row: encoded as the first row, with weight 0."""


def num_steps(num_rows: int, batch: int) -> int:
    """Return the number of steps of an epoch, ceil(num_rows / batch)."""
    return _ceil_div(num_rows, batch)


def num_micro_batches(batch: int, world: int, micro: int) -> int:
    """Return the number of micro-batches per rank and step, ceil(ceil(batch / world) / micro)."""
    return _ceil_div(_ceil_div(batch, world), micro)


@lru_cache(maxsize=2)  # one sort per epoch, not one per step
def epoch_order(seed: int, task_id: str, epoch: int, num_rows: int) -> Indices:
    """Return the order of the rows in an epoch, a read-only permutation of 0..num_rows-1. Shape: (num_rows,).

    Sorts the raw words of a counter-based generator: NumPy guarantees that stream across versions, but not
    `Generator.permutation`.
    """
    digest = hashlib.sha256(json.dumps([seed, task_id, epoch]).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(num_rows)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)  # it is cached
    return order


def sample(seed: int, task_id: str, num_rows: int, count: int) -> list[int]:
    """Return the sorted numbers of up to `count` rows of a task, determined by the seed."""
    return sorted(epoch_order(seed, task_id, -1, num_rows)[:count].tolist())


def global_batch(seed: int, task_id: str, step: int, num_rows: int, batch: int) -> tuple[int, Indices]:
    """Return the epoch of a step, counted from 0 over the whole stage, and the rows of its global batch.

    Shape: (batch,), or shorter (at least 1) in the last step of an epoch.
    """
    epoch, k = divmod(step, num_steps(num_rows, batch))
    return epoch, epoch_order(seed, task_id, epoch, num_rows)[k * batch : (k + 1) * batch]


def share(indices: Indices, rank: int, world: int, micro: int, num_micro: int) -> list[Indices]:
    """Return a rank's micro-batches of a global batch: indices[rank::world], padded with -1.

    Shapes: (at most the global batch,) -> num_micro arrays of (micro,).

    Raises:
        ValueError: If the rank is not in the world, or its rows do not fit into num_micro micro-batches.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}: expected 0 <= rank < world={world}")
    mine = indices[rank::world]
    if len(mine) > micro * num_micro:
        raise ValueError(f"num_micro={num_micro}: {len(mine)} rows do not fit, at micro={micro}")
    padded = np.full(micro * num_micro, DUMMY, dtype=np.int64)
    padded[: len(mine)] = mine
    return list(padded.reshape(num_micro, micro))


def _ceil_div(count: int, size: int) -> int:
    if count < 1 or size < 1:
        raise ValueError(f"cannot divide {count} rows by {size}: expected at least 1 of each")
    return -(-count // size)
