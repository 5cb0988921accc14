"""What an optimizer step costs on many GPUs, on paper: operations, bytes over links, and where more GPUs stop paying.

    P      elements of the model;  T of these are trained;  b bytes of an element
    R      ranks;  G rows of the global batch, which is science and so the same for all R;  L tokens of a row
    r      ceil(G / R) rows of a rank, in k micro-batches
    operations of a rank      r L (4 P + 2 T): forward 2 P, backward 2 P for what flows back and 2 T for what is
                              trained; 2 P more where activations are computed again; attention over tokens is left out
    bytes of a rank           ZeRO-0 and 1: 2 b T; ZeRO-2: b T (k + 1); ZeRO-3: k b (2 P + T); all times (R - 1) / R
    seconds                   operations / (share of peak), and bytes / (the slowest link on the way)
Nothing is hidden behind anything in `step_s`, everything in `least_s`: the truth lies between. Links are one GPU's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cl_dist.run_config import RunConfig
from launcher.memory import share

RANKS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of node."""

    name: str = "8 x H100 SXM, 400 Gb/s a GPU"
    peak: float = 989e12
    """Dense bfloat16 operations a second of a GPU."""
    used: float = 0.4
    """Share of the peak that training of transformers reaches."""
    inside: float = 450e9
    """Bytes a second from a GPU to the others of its node."""
    between: float = 50e9
    """Bytes a second from a GPU to other nodes."""
    gpus: int = 8

    def link(self, ranks: int) -> float:
        """Return the bytes a second of the slowest link that a ring over some ranks needs."""
        return self.inside if ranks <= self.gpus else self.between


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do."""

    elements: int
    trained: int
    item: int
    global_batch: int
    tokens: int
    """Of a row."""
    zero_stage: int
    most_rows: int
    """Rows of a micro-batch at most."""
    recomputes: bool


def on_paper(work: Work, machine: Machine, ranks: Sequence[int] = RANKS) -> Iterator[dict[str, Any]]:
    """Yield the cost of a step for gangs of some sizes, the smallest first."""
    first: float | None = None
    for size in ranks:
        rows = share(work.global_batch, size)
        micro = share(rows, min(rows, work.most_rows))
        operations = rows * work.tokens * ((6 if work.recomputes else 4) * work.elements + 2 * work.trained)
        moved = _moved(work, size, micro)
        compute_s, link_s = operations / (machine.peak * machine.used), moved / machine.link(size)
        rate = work.global_batch * work.tokens / (compute_s + link_s)
        first = rate / size if first is None else first
        yield {
            "ranks": size,
            "rows": rows,
            "compute_s": compute_s,
            "moved_bytes": moved,
            "link_s": link_s,
            "step_s": compute_s + link_s,
            "least_s": max(compute_s, link_s),
            "tokens_per_s": rate,
            "share_of_first": rate / size / first,
            "note": _note(work, size, compute_s, link_s),
        }


def _moved(work: Work, ranks: int, micro: int) -> int:
    whole = {
        0: 2 * work.trained,
        1: 2 * work.trained,
        2: (micro + 1) * work.trained,
        3: micro * (2 * work.elements + work.trained),
    }[work.zero_stage]
    return math.ceil(work.item * whole * (ranks - 1) / ranks)


def _note(work: Work, ranks: int, compute_s: float, link_s: float) -> str:
    """Return why more ranks do not help, if so."""
    if ranks > work.global_batch:
        return f"{ranks - work.global_batch} ranks have no row"
    if link_s > compute_s:
        return "links take longer than computing"
    return ""


def work_of(config: RunConfig, document: dict[str, Any]) -> Work:
    """Return the work of a step of a run, from its plan."""
    found, science = document["memory"], config.science
    settings = [science.train_of(task) for task in science.sequence().tasks]
    return Work(
        elements=found["elements"]["P"],
        trained=found["elements"]["T"],
        item=found["bytes_per_element"],
        global_batch=max(train.global_batch for train in settings),
        tokens=found["max_length"],
        zero_stage=config.cluster.zero_stage,
        most_rows=found["micro_batch"],
        recomputes=config.cluster.activation_checkpointing,
    )
