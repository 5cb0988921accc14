"""Running sums of a Train stage's loss terms, kept on the device between two reads."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_dist.parallel.world import World

Totals = dict[str, dict[str, float]]
"""Sums by name: "rows" of the terms over examples, "own" of the terms over parameters."""


class LossSums:
    """Adds up the loss terms of micro-batches without a synchronization between host and device."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}

    def add(self, rows: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Add one micro-batch: this rank's share of the terms over examples, and the terms over parameters."""
        for into, terms in ((self._rows, rows), (self._own, own)):
            for name, term in terms.items():
                into[name] = into.get(name, torch.zeros((), device=term.device)) + term.detach().float()

    def local(self) -> Totals:
        """Return the sums of this rank: one copy from the device to the host."""
        sums = [*self._rows.values(), *self._own.values()]
        values = iter(torch.stack(sums).tolist() if sums else [])
        return {"rows": {name: next(values) for name in self._rows}, "own": {name: next(values) for name in self._own}}

    def totals(self, world: World) -> Totals:
        """Return the sums over all ranks. A collective."""
        return over_ranks(world.gather(self.local()))

    def put(self, totals: Mapping[str, Mapping[str, float]], world: World) -> None:
        """Continue from the totals of an earlier attempt; rank 0 takes the part that was summed over ranks."""
        share = 1.0 if world.rank == 0 else 0.0
        self._rows = {n: torch.tensor(value * share, device=world.device) for n, value in totals["rows"].items()}
        self._own = {n: torch.tensor(value, device=world.device) for n, value in totals["own"].items()}

    def clear(self) -> None:
        """Start a new sum."""
        self._rows, self._own = {}, {}


def over_ranks(parts: Sequence[Totals]) -> Totals:
    """Return the totals of some ranks' sums, in rank order; the terms over parameters are equal on all ranks."""
    rows = {name: sum((part["rows"][name] for part in parts), 0.0) for name in parts[0]["rows"]}
    return {"rows": rows, "own": parts[0]["own"]}


def mean_terms(totals: Totals, steps: int) -> dict[str, float]:
    """Return each term's mean over some optimizer steps as train/<name>, and their sum as train/loss."""
    means = {f"train/{n}": value / steps for part in totals.values() for n, value in part.items()}
    return means | {"train/loss": sum(means.values())}
