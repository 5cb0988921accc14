"""Telemetry of a Train stage: learning rates, losses, gradient norm, throughput and memory, every few optimizer steps.

Between two events the loss terms are summed on the device, so that an optimizer step causes no synchronization and no
collective. An event reads them once and gathers them over the ranks; it computes nothing that training uses.
"""

import math
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_dist.errors import TrainingError
from cl_dist.parallel.engine import Engine
from cl_dist.stages.loss_sums import LossSums, mean_terms, over_ranks

GIB = 2.0**30


class Telemetry:
    """Reports an event after every `every` optimizer steps of a stage, and after its last one; never if `every` is 0.

    Numbers of an event, over the steps since the event before:
        train/<term>, train/loss                   mean of each loss term over the global batches, and their sum
        train/examples_per_s, train/tokens_per_s   over all ranks, without padding; scoring of dev rows and saving count
    and at its last step:
        train/lr, train/lr_<peak>                  learning rate, and that of the parameters with another peak rate
        train/grad_norm                            over all parameters and ranks, before clipping
        memory/cuda_peak_gib, memory/rss_peak_gib  of the rank that needs most: CUDA memory allocated since the stage
                                                   began, or without CUDA resident memory since the process began
    """

    def __init__(
        self, every: int, total_steps: int, lr: float, engine: Engine, report: Callable[[dict[str, Any]], None]
    ) -> None:
        """Begin with the engine's next step; lr is the peak rate of all parameters without one of their own."""
        self._every, self._total_steps, self._lr, self._engine, self._report = every, total_steps, lr, engine, report
        self._sums = LossSums()
        self._rates = _learning_rates(engine)
        if every and engine.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.world.device)
        self._begin_window()

    def _begin_window(self) -> None:
        self._sums.clear()
        self._steps = self._examples = self._tokens = 0
        self._began = time.monotonic()

    def add(self, rows: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Add the loss terms of a micro-batch; see LossSums.add."""
        if self._every:
            self._sums.add(rows, own)

    def end_step(self, done: int, examples: int, tokens: int) -> None:
        """Count an optimizer step and its global batch; report where an event is due. `done` counts it too.

        A collective if an event is due, which is so on all ranks or on none.

        Raises:
            TrainingError: If a loss or the gradient norm is not finite.
        """
        if not self._every:
            return
        self._steps, self._examples, self._tokens = self._steps + 1, self._examples + examples, self._tokens + tokens
        rates, self._rates = self._rates, _learning_rates(self._engine)  # the engine has moved on to the next step's
        if done % self._every == 0 or done == self._total_steps:
            numbers = self._losses_and_memory() | {"train/grad_norm": self._engine.grad_norm()}
            check_finite(numbers, done)
            numbers |= self._named(rates) | self._throughput()
            if self._engine.world.rank == 0:
                self._report({"event": "telemetry", "step": done, "total_steps": self._total_steps, **numbers})
            self._begin_window()

    def _losses_and_memory(self) -> dict[str, float]:
        world = self._engine.world
        name, peak = _peak_memory_gib(world.device)
        gathered = world.gather((self._sums.local(), peak))
        totals = over_ranks([sums for sums, _ in gathered])
        return mean_terms(totals, self._steps) | {name: max(peak for _, peak in gathered)}

    def _throughput(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        return {"train/examples_per_s": self._examples / seconds, "train/tokens_per_s": self._tokens / seconds}

    def _named(self, rates: Mapping[float, float]) -> dict[str, float]:
        if len(rates) == 1:
            (rate,) = rates.values()
            return {"train/lr": rate}
        return {"train/lr" if peak == self._lr else f"train/lr_{peak:g}": rate for peak, rate in rates.items()}


def _learning_rates(engine: Engine) -> dict[float, float]:
    """Return the learning rate of the next step by peak rate."""
    return {group["initial_lr"]: group["lr"] for group in engine.optimizer.param_groups}


def _peak_memory_gib(device: torch.device) -> tuple[str, float]:
    if device.type == "cuda":
        return "memory/cuda_peak_gib", torch.cuda.max_memory_allocated(device) / GIB
    return "memory/rss_peak_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def check_finite(numbers: Mapping[str, float], done: int) -> None:
    """Raise TrainingError for numbers that are not finite; they are equal on all ranks."""
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"training has diverged by step {done}: {', '.join(wrong)} is not finite; lower train.lr, or set "
            "train.max_grad_norm, train.warmup_ratio"
        )
