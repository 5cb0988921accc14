"""What steps and stages cost on many GPUs, on paper: operations, bytes over links, and where more GPUs stop paying.

    P      elements of the model;  T of these are trained;  b bytes of an element
    R      ranks;  G rows of the global batch, which is science and so the same for all R;  L tokens of a row
    r      ceil(G / R) rows of a rank, in k micro-batches
    operations of a rank      r times those of a row, which are counted in a dry run of the method's own loss: about
                              L (4 P + 2 T) where a row is read once, 2 P for what is computed forward, 2 P for what
                              flows back, 2 T for what is trained; twice that where LAMOL reads a row as question and
                              as sample; more where activations are computed again
    bytes of a rank           ZeRO-0 and 1: 2 b T; ZeRO-2: b T (k + 1); ZeRO-3: k b (2 P + T); all times (R - 1) / R
    seconds                   operations / (share of peak), and bytes / (the slowest link on the way)
Nothing is hidden behind anything in `step_s`, everything in `least_s`: the truth lies between. Links are one GPU's.

    training stage            steps * step_s, and loading
    stage that is in shards   loading, and ceil(shards / models) times a shard's forward passes, where R workers hold
                              R / workers_per_model models
    forward pass              max(operations / (share of peak), b P / (what memory gives)): all weights are read for it
    loading                   (b P + 4 T) / (what a worker reads of files): the backbone, then what was trained
Every row has L tokens, and every sample is good at the first attempt. Left out: the start of workers, dev rows,
checkpoints, the cache of keys and values, the host's part (launching kernels, comparing the maps of a vote).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cl_dist.kinds import Sizes, kind_of, trainings
from cl_dist.planning.memory import share
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import Stage, ref

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
    memory: float = 3.35e12
    """Bytes a second between a GPU and its memory."""
    files: float = 2e9
    """Bytes a second that a worker reads of files while the others of its node do the same."""

    def link(self, ranks: int) -> float:
        """Return the bytes a second of the slowest link that a ring over some ranks needs."""
        return self.inside if ranks <= self.gpus else self.between

    def computing(self, operations: float) -> float:
        """Return the seconds of some operations."""
        return operations / (self.peak * self.used)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do, and what a model does that reads."""

    elements: int
    trained: int
    item: int
    global_batch: int
    tokens: int
    """Of a row."""
    zero_stage: int
    most_rows: int
    """Rows of a micro-batch at most."""
    operations: int
    """Of a row in a step, forward and backward."""
    read_operations: int = 0
    """Of a row in a forward pass."""
    answer: int = 1
    """Tokens that are written to answer a row; one where that is a class."""
    parallel_samples: int = 0
    """Samples that an actor generates at the same time."""
    workers_per_model: int = 1


@dataclass(frozen=True, slots=True)
class StepCost:
    """Estimated cost of an optimizer step on a number of ranks."""

    ranks: int
    rows: int
    """Rows of a rank."""
    compute_s: float
    moved_bytes: int
    link_s: float
    step_s: float
    least_s: float
    tokens_per_s: float
    share_of_first: float
    """Tokens a second and rank, relative to the smallest gang."""
    note: str
    """The reason why more ranks do not help; "" where they do."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Estimated seconds of a stage for each number of GPUs in RANKS."""

    stage: str
    rows: int | None
    seconds: tuple[float, ...] | None
    """None where there is no estimate."""


def step_costs(work: Work, machine: Machine, ranks: Sequence[int] = RANKS) -> Iterator[StepCost]:
    """Yield the cost of a step for gangs of some sizes, the smallest first."""
    first: float | None = None
    for size in ranks:
        rows = share(work.global_batch, size)
        micro = share(rows, min(rows, work.most_rows))
        moved = _moved(work, size, micro)
        compute_s, link_s = machine.computing(rows * work.operations), moved / machine.link(size)
        rate = work.global_batch * work.tokens / (compute_s + link_s)
        first = rate / size if first is None else first
        yield StepCost(
            ranks=size,
            rows=rows,
            compute_s=compute_s,
            moved_bytes=moved,
            link_s=link_s,
            step_s=compute_s + link_s,
            least_s=max(compute_s, link_s),
            tokens_per_s=rate,
            share_of_first=rate / size / first,
            note=_note(work, size, compute_s, link_s),
        )


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


def stage_costs(
    config: RunConfig, rows: Sequence[int | None], work: Work, machine: Machine, ranks: Sequence[int] = RANKS
) -> Iterator[StageCost]:
    """Yield the seconds of each stage for each number of GPUs; `rows` has each stage's rows, None if unknown."""
    run = Run(config)
    for stage, number in zip(run.stages(), rows, strict=True):
        seconds = _seconds(config, stage, number, work, machine, ranks) if number else None
        yield StageCost(run.ledger.key(ref(stage)), number, None if seconds is None else tuple(seconds))


def _seconds(
    config: RunConfig, stage: Stage, rows: int, work: Work, machine: Machine, ranks: Sequence[int]
) -> list[float] | None:
    loading = (work.item * work.elements + 4 * work.trained) / machine.files
    if (training := next(iter(trainings([stage])), None)) is not None:
        train = training.settings or config.science.train_of(config.science.sequence().tasks[stage.task])
        steps = train.epochs * share(rows, train.global_batch)
        found = step_costs(replace(work, global_batch=train.global_batch), machine, ranks)
        return [loading + steps * step.step_s for step in found]
    cost = kind_of(stage).cost
    if cost is None:
        return None
    shards = cost(config.science, stage, rows, Sizes(work.tokens, work.answer, work.parallel_samples))
    a_shard = sum(count * _pass(tokens, work, machine) for count, tokens in shards.passes)
    return [loading + share(shards.number, max(1, size // work.workers_per_model)) * a_shard for size in ranks]


def _pass(tokens: int, work: Work, machine: Machine) -> float:
    """Return the seconds of a forward pass over so many tokens of any rows."""
    operations = tokens * work.read_operations / work.tokens
    return max(machine.computing(operations), work.item * work.elements / machine.memory)


def cells(seconds: Sequence[float] | None) -> list[str]:
    """Return the seconds of a stage as a table shows them; "-" where there is no estimate."""
    if seconds is None:
        return ["-"] * len(RANKS)
    return [f"{each:,.0f}" if each >= 100 else f"{each:.3g}" for each in seconds]
