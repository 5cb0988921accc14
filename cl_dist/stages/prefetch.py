"""Micro-batches of a rank, collated in a background thread while the step before them runs."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch

from cl_dist.data.sampler import global_batch, num_micro_batches, share
from cl_dist.learners.base import Rows
from cl_dist.models.classifier import Batch
from cl_dist.parallel.world import World
from cl_dist.stages.stage_job import Job

AUTO_MICRO = 32
"""Largest micro-batch that micro_batch: auto chooses."""
AHEAD = 2
"""Micro-batches that are prepared ahead of the one in use."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch of a rank, and what its optimizer step needs to know of the whole global batch."""

    step: int
    inputs: Batch
    """On the host, in pinned memory where the rank has a GPU."""
    examples: int
    tokens: int
    """Tokens of the global batch, without padding."""
    normalizers: Mapping[str, float]
    """Divisor of each loss term's sum over the global batch; `examples` for a term that it does not name."""

    def on(self, device: torch.device) -> Batch:
        """Return the inputs on a device."""
        return {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}


@dataclass(frozen=True, slots=True)
class Split:
    """A rank's part of a global batch, in micro-batches of equal size."""

    micro: int
    """Rows of a micro-batch."""
    num_micro: int
    """Micro-batches of an optimizer step."""

    @classmethod
    def of(cls, job: Job, world: World) -> "Split":
        """Return the split that the settings ask for."""
        size, wanted = job.train.global_batch, job.engine.micro_batch
        micro = min(num_micro_batches(size, world.size, 1), AUTO_MICRO if wanted == "auto" else wanted)
        return cls(micro, num_micro_batches(size, world.size, micro))


def micro_batches(job: Job, rows: Rows, steps: Iterable[int], world: World, split: Split) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of some optimizer steps, in order."""
    task_id, size = job.tasks[job.stage.task].id, job.train.global_batch
    for step in steps:
        _, indices = global_batch(job.seed, task_id, step, len(rows), size)
        indices = np.array(rows.by_length(indices))
        normalizers, tokens = rows.normalizers(indices), sum(rows.length(int(number)) for number in indices)
        for places in share(indices, world.rank, world.size, split.micro, split.num_micro):
            inputs = rows.batch(places)
            if world.device.type == "cuda":
                inputs = {name: value.pin_memory() for name, value in inputs.items()}
            yield MicroBatch(step, inputs, len(indices), tokens, normalizers)


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over a source that runs in a thread of its own, up to `ahead` items ahead.

    Items come in the source's order. What the source raises is raised in the place of the item; after that the
    iterator is exhausted.
    """

    def __init__(self, source: Iterator[T], device: torch.device, ahead: int = AHEAD) -> None:
        """Start the thread; device is the one that CUDA calls of the source belong to."""
        self._source = source
        self._thread = ThreadPoolExecutor(1, "prefetch", _set_device, (device,))
        self._items: deque[Future[list[T]]] = deque(self._thread.submit(self._take) for _ in range(ahead))

    def _take(self) -> list[T]:
        """Return the next item in a list, or an empty list at the end: a future cannot raise StopIteration."""
        return list(islice(self._source, 1))

    def __next__(self) -> T:
        """Return the next item, once it is ready."""
        taken = self._items.popleft().result() if self._items else []
        if not taken:
            self.close()
            raise StopIteration
        self._items.append(self._thread.submit(self._take))
        return taken[0]

    def close(self) -> None:
        """End the thread; prepared items are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._items.clear()


def _set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
