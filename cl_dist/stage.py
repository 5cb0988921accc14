"""The kinds of stage as frozen data, what they refer to, and the fingerprint that identifies a result."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from cl_dist.config import Section

SCHEMA_VERSION = 1
"""Enters every fingerprint; raised when a default or the meaning of a stored file changes."""


class StageRef(Section):
    """Names a stage by task index (0-based place in the order) and stage name."""

    task: int
    stage: str


def model_after(task: int) -> StageRef:
    """Name the model that task's Train stage leaves behind."""
    return StageRef(task=task, stage="train")


class TrainConfig(Section):
    """How a Train stage optimises, whatever the method."""

    epochs: int = Field(5, gt=0)
    """Passes over the train rows of a task."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps with a rising learning rate; it falls linearly to 0 afterwards."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Upper bound of the gradient norm; 0 switches clipping off."""
    global_batch: int = Field(32, gt=0, le=1_000_000)
    """Rows behind one optimizer step, over all workers; accumulation follows from it."""
    max_length: int = Field(128, gt=2)
    """Longest input in tokens; longer ones are cut."""
    min_round_steps: int = Field(50, gt=0)
    """Shortest round in optimizer steps. A round is one epoch or more; gates anneal once per round, and dev rows are
    scored at its end."""
    keep: Literal["last", "best_dev"] = "best_dev"
    """Which weights a task leaves behind: those after the last step, or those of the round with the lowest dev loss,
    if it has dev rows."""


class EvaluateConfig(Section):
    """The unit of work of scoring. Part of the science half, so that scores do not depend on the workers."""

    batch: int = Field(64, gt=0)
    """Rows scored together."""
    shard_rows: int = Field(256, gt=0)
    """Rows of one shard: the unit of retry."""


class GenerateConfig(Section):
    """How pseudo-samples are drawn, and the unit of that work: all of it decides which samples come out."""

    parallel_samples: int = Field(32, gt=0)
    """Samples in one generation batch; when one ends, the next takes its place."""
    kv_cache_gb: float = Field(8.0, gt=0)
    """Limit of the KV cache in GB. The batch shrinks where `parallel_samples` rows of max_length tokens need more. The
    limit follows from the model's shape, not from free memory, so that every machine writes the same samples."""
    shard_samples: int = Field(64, gt=0)
    """Samples of one shard: the unit of retry."""
    top_k: int = Field(20, ge=0)
    """Draw among so many likeliest tokens; 0 among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that together have this probability."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling; below 1 makes likely tokens more likely."""
    max_attempts: int = Field(8, gt=0)
    """How often a sample is drawn anew when it is malformed, the first time included."""
    require_known_label: bool = True
    """Whether an answer that is no label of the sample's task is malformed; not so for tasks with free answers."""
    require_known_question: bool = True
    """Whether a sample whose text does not end in its task's question is malformed; not so for tasks without one."""
    balance_labels: bool = True
    """Whether labels are kept near their shares among the task's train rows: what is drawn from few candidates per
    token tends to one label. A sample too many of a label is drawn anew, and kept if no other comes."""
    min_yield: float = Field(0.5, ge=0, le=1)
    """Share of the requested samples that must come out well-formed and distinct; below it the run stops."""


class Budget(Section):
    """How many rows of earlier tasks are replayed beside a new task."""

    gamma: float = Field(0.2, ge=0)
    """All earlier tasks together get this share of the new task's train rows, in equal parts."""
    min_replay: int = Field(0, ge=0)
    """Every earlier task gets at least so many: a small new task would else replay next to nothing of large ones."""

    def per_task(self, new_rows: int, earlier: int) -> int:
        """Return the rows of each of some earlier tasks: ceil(gamma * new_rows) / earlier, rounded down."""
        return max(math.ceil(self.gamma * new_rows) // earlier, self.min_replay) if earlier else 0


class StageBase(Section):
    """What every kind of stage has."""

    kind: str
    task: int

    @property
    def name(self) -> str:
        """Folder name of the stage below its task."""
        return self.kind


class Train(StageBase):
    """A gang trains one model on the train rows of some tasks; their dev rows select the best weights."""

    kind: Literal["train"] = "train"
    task: int
    data: tuple[int, ...]
    """Tasks whose train rows are used."""
    init: StageRef | None = None
    """Stage whose model this one starts from; None starts from the backbone."""
    learner: str | None = None
    """Which of the method's learners; None takes the one that the run answers with."""
    replay: tuple[int, ...] = ()
    """Earlier tasks of which some train rows are used too."""
    replay_rows: int = 0
    """How many of each, chosen by the run's seed."""
    budget: Budget | None = None
    """Says how many of each instead, from the rows of the stage's own task."""
    samples: StageRef | None = None
    """Generate stage whose pseudo-samples are trained on too."""
    role: Literal["train", "free", "try", "invrat"] = "train"
    """Folder name below the task: train is what the task leaves behind, free a model that is only voted on, try one of
    several to choose from, invrat one that finds rationales."""
    trial: int | None = None
    """Which of several stages of the same role."""
    settings: TrainConfig | None = None
    """Training settings of its own, in place of the task's."""
    frozen: StageRef | None = None
    """Vote or Choose stage whose choice is not trained."""
    frozen_units: tuple[tuple[int, int], ...] = ()
    """(layer, unit) pairs that are not trained."""

    @property
    def name(self) -> str:
        """See StageBase."""
        return self.role if self.trial is None else f"{self.role}-{self.trial}"

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return tuple(ref for ref in (self.init, self.samples, self.frozen) if ref is not None)


class Generate(StageBase):
    """Shards write pseudo-samples of earlier tasks with the model that has learned them."""

    kind: Literal["generate"] = "generate"
    task: int
    model: StageRef
    sources: tuple[int, ...]
    """The earlier tasks."""
    budget: Budget

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model,)


class VoteConfig(Section):
    """How critical components are voted on (see models/cci.py)."""

    level: Literal["block", "group", "head"] = "block"
    """What may be frozen: whole layers, heads that share keys (heads, where none do), or single heads."""
    beta: int = Field(80, ge=0, lt=100)
    """Percentile above which a token of an attention row counts as chosen."""
    attention_scope: Literal["context", "all"] = "context"
    """Which tokens look and are looked at: those of the text, or those of question and answer too."""
    max_examples: int = Field(200, gt=0)
    """Rows of each voting task: its first dev rows, or train rows where it has no dev rows."""
    rationales: Literal["human", "invrat", "gradient"] = "human"
    """Where rationales come from: the data, or, for tasks that have none, a model that learns to find them (see
    methods/invrat.py), or the model before the task (gradient x input)."""
    rationale_share: float = Field(0.2, gt=0, le=1)
    """Share of a text's tokens that a rationale found by gradients has."""
    voting_tasks: Literal["previous", "all"] = "previous"
    """Whose rows vote: those of the task before, or of all earlier tasks."""
    top_k: int = Field(12, gt=0)
    """Groups or heads that every row votes for, and that are frozen in the end; of blocks it is one."""
    shard_samples: int = Field(25, gt=0)
    """Rows of one shard: the unit of retry."""
    min_margin: float = Field(0.05, ge=0, le=1)
    """A lead of the last unit that is frozen over the first one that is not, as a share of the rows, below which a
    warning says that the vote is not decisive."""


class Rationalise(StageBase):
    """Shards find rationales of the rows of a task that may vote, with the best of some models trained for it."""

    kind: Literal["rationalise"] = "rationalise"
    task: int
    models: tuple[StageRef, ...]
    """Train stages that differ in their seed; the one with the highest dev accuracy is used."""
    learner: str = "invrat"
    """Which of the method's learners they were trained by."""
    sources: tuple[int, ...]
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return self.models


class Record(StageBase):
    """Shards note where the model before the task looks when it reads the rows that vote, as bits."""

    kind: Literal["record"] = "record"
    task: int
    model: StageRef
    sources: tuple[int, ...]
    """The tasks whose rows vote."""
    rationales: tuple[StageRef, ...] = ()
    """Rationalise stages of the sources, where rationales come from there."""
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model, *self.rationales)


class Vote(StageBase):
    """Shards compare a freely trained model with what was recorded; what has moved furthest away is critical."""

    kind: Literal["vote"] = "vote"
    task: int
    model: StageRef
    recorded: StageRef
    sources: tuple[int, ...]
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model, self.recorded)


class Choose(StageBase):
    """Shards score models that were trained with different units frozen; the units of the best one are critical."""

    kind: Literal["choose"] = "choose"
    task: int
    model: StageRef
    """What the candidates started from."""
    candidates: tuple[StageRef, ...]
    units: tuple[tuple[int, int], ...]
    """The (layer, unit) that was frozen in each candidate."""
    sources: tuple[int, ...]
    """The tasks whose dev rows are scored (train rows, where there are none)."""
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model, *self.candidates)


class Evaluate(StageBase):
    """Shards score the test rows of some tasks with one model."""

    kind: Literal["evaluate"] = "evaluate"
    task: int
    model: StageRef
    tasks: tuple[int, ...]
    previous: StageRef | None = None
    """Evaluate stage whose scores stand for the other seen tasks, where their models did not change."""
    without: tuple[str, ...] = ()
    """Parts of the learner that are switched off for an extra score of `task`: an ablation without retraining."""

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model,) if self.previous is None else (self.model, self.previous)


Stage = Train | Generate | Rationalise | Record | Vote | Choose | Evaluate


def ref(stage: Stage) -> StageRef:
    """Return the name of a stage."""
    return StageRef(task=stage.task, stage=stage.name)


def digest_of(data: Any) -> str:
    """Return the sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys, so that a difference can be named."""
    facts: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            facts |= flat(value, f"{prefix}{key}.")
        else:
            facts[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return facts
