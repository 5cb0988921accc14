"""The plan of a run, as data: its stages, and the memory, disk space and devices that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cl_dist.config import Tree
from cl_dist.planning import memory, scaling
from cl_dist.planning.memory import Estimate, Quantity


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: what it reads and writes, and whether it is finished."""

    stage: str
    """Its key, such as "00-movies/train"."""
    task: str
    kind: str
    rows: int | None
    """Rows that it trains on, generates or scores; None where data are missing."""
    inputs: tuple[str, ...]
    """Keys of the stages that it reads."""
    reads: tuple[str, ...]
    """Tasks and splits whose rows it reads."""
    writes: tuple[str, ...]
    fingerprint: str | None
    """None where data or weights are missing."""
    done: bool


@dataclass(frozen=True, slots=True)
class Elements:
    """Element counts of the last task's model."""

    total: int
    trained: int
    largest_module: int
    parts_of_tasks: int
    added_by_the_last_task: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Memory of a training rank under one engine and ZeRO stage."""

    zero_stage: int | None
    """None is plain torch."""
    configured: bool
    """Whether the run file names it."""
    estimate: Estimate

    def document(self) -> Tree:
        """Return it as plain data."""
        return {"zero_stage": self.zero_stage, "configured": self.configured} | self.estimate.plain()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of the run's processes."""

    workers: int
    micro_batch: int
    micro_batches: int
    """Micro-batches of an optimizer step."""
    max_length: int
    parallel_samples: int
    """Samples that an actor generates at the same time; 0 where the run generates none."""
    labels: Mapping[str, int]
    """Label positions of a micro-batch, by loss term."""
    bytes_per_element: int
    trained_row_operations: int
    """Floating-point operations of a row in a step, forward and backward."""
    read_row_operations: int
    """Floating-point operations of a row in a forward pass."""
    elements: Elements
    ranks: tuple[RankPlan, ...]
    pool: Mapping[str, tuple[Quantity, ...]]
    """Memory of an actor, by the kind of stage that is divided into shards."""
    host: tuple[Quantity, ...]

    @property
    def configured(self) -> RankPlan:
        """The engine and ZeRO stage that the run file names."""
        return next(rank for rank in self.ranks if rank.configured)

    def document(self) -> Tree:
        """Return it as plain data."""
        return {
            "workers": self.workers,
            "micro_batch": self.micro_batch,
            "micro_batches": self.micro_batches,
            "max_length": self.max_length,
            "parallel_samples": self.parallel_samples,
            "labels": dict(self.labels),
            "bytes_per_element": self.bytes_per_element,
            "operations": {"trained_row": self.trained_row_operations, "read_row": self.read_row_operations},
            "elements": {
                "P": self.elements.total,
                "T": self.elements.trained,
                "M": self.elements.largest_module,
                "parts_of_tasks": self.elements.parts_of_tasks,
                "added_by_the_last_task": self.elements.added_by_the_last_task,
            },
            "ranks": [rank.document() for rank in self.ranks],
            "pool": {kind: [memory.plain(each) for each in found] for kind, found in self.pool.items()},
            "host": [memory.plain(each) for each in self.host],
        }


@dataclass(frozen=True, slots=True)
class Fit:
    """A configuration that fits on devices of a size."""

    workers: int
    zero_stage: int
    micro_batch: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The smallest gang of devices of a size that can train the run."""

    device_gib: float
    too_small_for: tuple[str, ...]
    """Kinds of stage whose actors do not fit on such a device."""
    fit: Fit | None
    """None where even the largest gang does not fit."""

    def document(self) -> Tree:
        """Return it as plain data."""
        fit = {"workers": None} if self.fit is None else asdict(self.fit)
        return {"device_gib": self.device_gib, "too_small_for": list(self.too_small_for), **fit}


@dataclass(frozen=True, slots=True)
class Plan:
    """What `cl-dist plan` shows."""

    run: str
    stages: tuple[StagePlan, ...]
    memory: MemoryPlan | None
    """None where it was not requested, or where the sizes of the model are not at hand."""
    disk: tuple[Quantity, ...] = ()
    clusters: tuple[DevicePlan, ...] = ()
    baselines: Mapping[str, str] = field(default_factory=dict)
    """Method of each baseline, by its name."""
    assumptions: tuple[str, ...] = ()
    """What the plan could not read and assumes instead."""
    hints: tuple[str, ...] = ()
    """Tasks with too few optimizer steps for the method."""
    step_costs: tuple[scaling.StepCost, ...] | None = None
    stage_costs: tuple[scaling.StageCost, ...] | None = None

    def document(self) -> Tree:
        """Return the plan as plain data: the JSON document of `cl-dist plan --json`."""
        stages = [{name: _listed(value) for name, value in asdict(stage).items()} for stage in self.stages]
        document: Tree = {"run": self.run, "stages": stages, "memory": None}
        if self.memory is not None:
            document |= {
                "memory": self.memory.document(),
                "disk": [memory.plain(each) for each in self.disk],
                "clusters": [each.document() for each in self.clusters],
            }
        document |= {"baselines": dict(self.baselines), "assumptions": list(self.assumptions)}
        document["hints"] = list(self.hints)
        if self.step_costs is not None:
            document["scaling"] = [asdict(cost) for cost in self.step_costs]
        if self.stage_costs is not None:
            document["stage_seconds"] = [asdict(cost) for cost in self.stage_costs]
        return document


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
