"""Table of stage kinds: one entry has everything the driver knows about a kind.

To add a kind, write a class in `stage.py`, an entry here, and a module in `stages/` with its worker. Torch-free.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import TaskConfig
from cl_dist.data.votes import voting_rows
from cl_dist.methods import get_method
from cl_dist.methods.base import MethodConfig, TaskSequence
from cl_dist.stage import (
    Choose,
    Evaluate,
    EvaluateConfig,
    Generate,
    GenerateConfig,
    Rationalise,
    Record,
    Stage,
    StageRef,
    Train,
    TrainConfig,
    Vote,
)

Facts = dict[str, Any]
Reader = Callable[[str], Any]
"""Reads a JSON file of a finished stage by its name."""


class Science(Protocol):
    """The part of the science section that stages depend on."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    @property
    def method(self) -> MethodConfig:
        """Settings of the method."""

    @property
    def evaluate(self) -> EvaluateConfig:
        """Settings of scoring."""

    @property
    def generate(self) -> GenerateConfig:
        """Settings of sample generation."""

    def train_of(self, task: TaskConfig) -> TrainConfig:
        """Return the training settings of one task."""


class RunView(Protocol):
    """The part of `cl_dist.run.Run` that entries use."""

    tasks: TaskSequence

    @property
    def science(self) -> Science:
        """The settings that decide results."""

    @property
    def output(self) -> str:
        """Output layer on the backbone: "classifier" or "lm"."""

    def data(self, task: int) -> TaskData:
        """Return the rows of a task."""

    def stage(self, ref: StageRef) -> Stage:
        """Return a planned stage."""

    def max_length(self, task: int) -> int:
        """Return the longest input of a task in tokens."""

    def backbone_facts(self, stage: Stage) -> Facts:
        """Return the fingerprint inputs of the backbone of a stage."""

    def num_rows(self, stage: Stage) -> int:
        """Return the number of rows that a stage trains on, generates or scores."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that the cost of a stage depends on."""

    tokens: int
    """Longest row in tokens."""
    answer: int
    """Longest answer in tokens."""
    parallel_samples: int
    """Samples in one generation batch."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of a stage: their number, and the forward passes of one shard as (count, tokens per pass)."""

    number: int
    passes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageKind:
    """One kind of stage, from the driver's point of view."""

    facts: Callable[[RunView, Any], Facts]
    """Fingerprint inputs other than its plan, its rows and the fingerprints of the stages it reads."""
    row_facts: Callable[[RunView, Any], Facts]
    """Fingerprint inputs derived from the rows it reads."""
    num_rows: Callable[[RunView, Any], int]
    """Number of rows it trains on, generates or scores."""
    reads: Callable[[Any], list[tuple[int, str]]]
    """Tasks whose rows it reads, with the names of the splits."""
    starts_from: Callable[[Any], StageRef | None]
    """Train stage whose model it starts from; None for the backbone, and for a choice of several models."""
    writes: tuple[str, ...]
    """Files of the finished stage."""
    worker: str | None
    """'module:NAME' of its `stages.shards.ShardedKind`; None for the kind that a gang runs."""
    metrics: Callable[[Reader], dict[str, float]] = lambda read: {}
    """Metrics of a finished stage for trackers and the summary."""
    section: str | None = None
    """Section of summary.json for the results of its stages."""
    found: Callable[[RunView, Any, Reader], list[Facts]] = lambda run, stage, read: []
    """Entries of that section."""
    memory: Literal["forward", "attention", "generation"] | None = None
    """Memory in addition to the model: activations of `evaluate.batch` rows, attention maps, or a KV cache."""
    cost: Callable[[Science, Any, int, Sizes], Shards] | None = None
    """(science, stage, rows, sizes) -> shards and their forward passes; None if there is no estimate."""


def kind_of(stage: Stage) -> StageKind:
    """Return the entry of a stage."""
    return KINDS[stage.kind]


def _name(run: RunView, task: int) -> str:
    return run.tasks.tasks[task].id


def _lengths(run: RunView, stage: Stage, tasks: Iterable[int]) -> dict[str, int]:
    """Return max_length by task id, where it differs from that of the stage's own task (part of its settings)."""
    own = run.max_length(stage.task)
    return {_name(run, u): run.max_length(u) for u in tasks if run.max_length(u) != own}


def _questions(run: RunView, tasks: Iterable[int]) -> dict[str, str]:
    return {_name(run, u): run.data(u).question for u in tasks}


def _train_facts(run: RunView, stage: Train) -> Facts:
    science, task = run.science, run.tasks.tasks[stage.task]
    read = (*stage.data, *stage.replay)
    facts: Facts = {
        "seed": science.seed,
        "model": run.backbone_facts(stage),
        "method": science.method.changed() | {"name": science.method.name},
        "train": {} if stage.settings is not None else science.train_of(task).changed(),
        "evaluate": {"batch": science.evaluate.batch},  # dev rows are scored in batches of this size
        "max_length": {} if stage.settings is not None else _lengths(run, stage, read),
    }
    if version := get_method(science.method.name).version:
        facts["method_version"] = version
    if stage.role == "invrat":
        facts["environments"] = [run.data(u).digests.get("environments") for u in stage.data]
    if run.output == "lm":
        facts["questions"] = _questions(run, read)
    if stage.budget is not None:
        facts["new_rows"] = len(run.data(stage.task).train)
    return facts


def _train_row_facts(run: RunView, stage: Train) -> Facts:
    seen = [run.data(u) for u in (*stage.data, *stage.replay)]
    return {
        "rows": {_name(run, u): [run.data(u).digests[s] for s in ("train", "dev")] for u in stage.data},
        "replay_rows": {_name(run, u): run.data(u).digests["train"] for u in stage.replay},
        "labels": {data.id: list(data.labels) for data in seen},
    }


def _train_rows(run: RunView, stage: Train) -> int:
    new = len(run.data(stage.task).train)
    per_task = stage.replay_rows if stage.budget is None else stage.budget.per_task(new, len(stage.replay))
    generated = 0 if stage.samples is None else run.num_rows(run.stage(stage.samples))
    replayed = sum(min(per_task, len(run.data(task).train)) for task in stage.replay)
    return sum(len(run.data(task).train) for task in stage.data) + replayed + generated


def _train_reads(stage: Train) -> list[tuple[int, str]]:
    return [*((task, "train, dev") for task in stage.data), *((task, "train, replayed") for task in stage.replay)]


def _generate_facts(run: RunView, stage: Generate) -> Facts:
    return {
        "generate": run.science.generate.changed(),
        "seed": run.science.seed,
        "max_length": {_name(run, u): run.max_length(u) for u in stage.sources},
        "new_rows": len(run.data(stage.task).train),
        "questions": _questions(run, stage.sources),
    }


def _generate_metrics(read: Reader) -> dict[str, float]:
    statistics = read("replay.json")["tasks"].values()
    names = ("requested", "generated", "malformed", "duplicate", "kept")
    return {f"replay/{name}": sum(numbers[name] for numbers in statistics) for name in names}


def _generate_found(run: RunView, stage: Generate, read: Reader) -> list[Facts]:
    """Return the statistics of the samples of each earlier task, with five of its real rows."""
    lines = []
    for source in stage.sources:
        data = run.data(source)
        shown = [(row.text, row.text_pair, data.question, row.label) for row in data.train[:5]]
        real = [" => ".join(part for part in parts if part) for parts in shown]
        numbers = read("replay.json")["tasks"][data.id]
        lines.append({"before": _name(run, stage.task), "task": data.id, "real": real, **numbers})
    return lines


def _generate_cost(science: Science, stage: Generate, rows: int, sizes: Sizes) -> Shards:
    size = min(rows, science.generate.shard_samples)
    slots = min(size, sizes.parallel_samples)
    return Shards(_share(rows, size), ((_share(size, slots) * sizes.tokens, slots),))


Voting = Rationalise | Record | Vote | Choose


def _vote_facts(run: RunView, stage: Voting) -> Facts:
    return {
        "max_length": run.max_length(stage.task),
        "max_lengths": _lengths(run, stage, stage.sources),
        "questions": _questions(run, stage.sources),
    }


def _vote_row_facts(run: RunView, stage: Voting) -> Facts:
    return {"rows": {_name(run, u): run.data(u).digests for u in stage.sources}}


def _vote_rows(run: RunView, stage: Voting) -> int:
    return sum(len(voting_rows(run.data(u), stage.vote.max_examples)) for u in stage.sources)


def _vote_reads(stage: Voting) -> list[tuple[int, str]]:
    return [(task, "dev, or train") for task in stage.sources]


def _vote_metrics(read: Reader) -> dict[str, float]:
    found = read("critical.json")
    return {
        "vote/samples": found["used"],
        "vote/skipped": sum(found["skipped"].values()),
        "vote/margin": found["margin"],
    }


def _vote_found(run: RunView, stage: Vote | Choose, read: Reader) -> list[Facts]:
    """Return the choice and its evidence: histograms of the chosen units, and the sum over the other units."""
    found = read("critical.json")
    line = {name: value for name, value in found.items() if name not in ("minima", "histogram")}
    if "histogram" in found:
        bins = {(layer, unit): c for layer, units in enumerate(found["histogram"]) for unit, c in enumerate(units)}
        chosen = [bins.pop((layer, unit)) for layer, unit in found["chosen"]]
        line["distribution"] = {"chosen": chosen, "others": [sum(c) for c in zip(*bins.values(), strict=True)]}
    return [{"task": _name(run, stage.task), **line}]


def _vote_cost(science: Science, stage: Record | Vote, rows: int, sizes: Sizes) -> Shards:
    size = min(rows, stage.vote.shard_samples)
    by_gradients = isinstance(stage, Record) and stage.vote.rationales == "gradient"
    return Shards(_share(rows, size), ((size * (3 if by_gradients else 1), sizes.tokens),))  # forward and backward


def _evaluate_facts(run: RunView, stage: Evaluate) -> Facts:
    facts: Facts = {
        "evaluate": run.science.evaluate.changed(),
        "max_length": _lengths(run, stage, stage.tasks),
    }
    if run.output == "lm":
        facts["questions"] = _questions(run, stage.tasks)
        facts["metrics"] = {_name(run, u): run.tasks.tasks[u].metric for u in stage.tasks}
    return facts


def _evaluate_row_facts(run: RunView, stage: Evaluate) -> Facts:
    return {"rows": {_name(run, u): run.data(u).digests["test"] for u in stage.tasks}}


def _evaluate_cost(science: Science, stage: Evaluate, rows: int, sizes: Sizes) -> Shards:
    size = min(rows, science.evaluate.shard_rows)
    batch = min(size, science.evaluate.batch)
    reads = (_share(size, batch), batch * sizes.tokens)
    return Shards(_share(rows, size), (reads, (reads[0] * (sizes.answer - 1), batch)))


def _share(count: int, size: int) -> int:
    return -(-count // size)


_VOTING: Mapping[str, Any] = {
    "facts": _vote_facts,
    "row_facts": _vote_row_facts,
    "num_rows": _vote_rows,
    "reads": _vote_reads,
}

KINDS: Mapping[str, StageKind] = {
    "train": StageKind(
        facts=_train_facts,
        row_facts=_train_row_facts,
        num_rows=_train_rows,
        reads=_train_reads,
        starts_from=lambda stage: stage.init,
        writes=("trainable*.safetensors", "learner.safetensors", "train.json"),
        worker=None,
        metrics=lambda read: dict(read("train.json")["metrics"]),
    ),
    "generate": StageKind(
        facts=_generate_facts,
        row_facts=lambda run, stage: {"labels": {_name(run, u): list(run.data(u).labels) for u in stage.sources}},
        num_rows=lambda run, stage: (
            len(stage.sources) * stage.budget.per_task(len(run.data(stage.task).train), len(stage.sources))
        ),
        reads=lambda stage: [(task, "labels") for task in stage.sources],
        starts_from=lambda stage: stage.model,
        writes=("samples.jsonl", "replay.json"),
        worker="cl_dist.stages.generate:KIND",
        metrics=_generate_metrics,
        section="replay",
        found=_generate_found,
        memory="generation",
        cost=_generate_cost,
    ),
    "rationalise": StageKind(
        **_VOTING,
        starts_from=lambda stage: None,
        writes=("rationales.jsonl", "rationalise.json"),
        worker="cl_dist.stages.rationalise:KIND",
    ),
    "record": StageKind(
        **_VOTING,
        starts_from=lambda stage: stage.model,
        writes=("recorded.jsonl",),
        worker="cl_dist.stages.vote:RECORD",
        memory="attention",
        cost=_vote_cost,
    ),
    "vote": StageKind(
        **_VOTING,
        starts_from=lambda stage: stage.model,
        writes=("critical.json",),
        worker="cl_dist.stages.vote:VOTE",
        metrics=_vote_metrics,
        section="votes",
        found=_vote_found,
        memory="attention",
        cost=_vote_cost,
    ),
    "choose": StageKind(
        **_VOTING,
        starts_from=lambda stage: stage.model,
        writes=("critical.json",),
        worker="cl_dist.stages.choose:KIND",
        section="votes",
        found=_vote_found,
        memory="forward",
    ),
    "evaluate": StageKind(
        facts=_evaluate_facts,
        row_facts=_evaluate_row_facts,
        num_rows=lambda run, stage: sum(len(run.data(task).test) for task in stage.tasks),
        reads=lambda stage: [(task, "test") for task in stage.tasks],
        starts_from=lambda stage: stage.model,
        writes=("scores.json", "predictions/*.jsonl"),
        worker="cl_dist.stages.evaluate:KIND",
        memory="forward",
        cost=_evaluate_cost,
    ),
}
