"""Stage kinds as frozen data, their settings, and the digest that identifies a result."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from cl_dist.config import Section

SCHEMA_VERSION = 1
"""Part of every fingerprint; incremented when a default or a stored file format changes."""


class StageRef(Section):
    """Reference to a stage by task index (0-based, in learning order) and stage name."""

    task: int
    stage: str


def model_after(task: int) -> StageRef:
    """Return the reference to the Train stage of a task."""
    return StageRef(task=task, stage="train")


class TrainConfig(Section):
    """Optimization settings of Train stages, common to all methods."""

    epochs: int = Field(5, gt=0)
    """Passes over the train rows of a task."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Fraction of the steps with linear warmup; the learning rate decays linearly to 0 afterwards."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Maximum gradient norm for clipping; 0 disables clipping."""
    global_batch: int = Field(32, gt=0, le=1_000_000)
    """Rows per optimizer step over all workers; determines gradient accumulation."""
    max_length: int = Field(128, gt=2)
    """Longest input in tokens; longer inputs are truncated."""
    min_round_steps: int = Field(50, gt=0)
    """Minimum length of a round in optimizer steps. A round is one or more epochs; gates anneal once per round, and dev
    rows are scored at its end."""
    keep: Literal["last", "best_dev"] = "best_dev"
    """Weights to keep after a task: those of the last step, or those of the round with the lowest dev loss (if the task
    has dev rows)."""


class EvaluateConfig(Section):
    """Batch and shard sizes of scoring; part of `science`, so scores do not depend on the number of workers."""

    batch: int = Field(64, gt=0)
    """Rows per batch."""
    shard_rows: int = Field(256, gt=0)
    """Rows per shard, the unit of retry."""


class GenerateConfig(Section):
    """Settings of pseudo-sample generation; all of them affect the samples."""

    parallel_samples: int = Field(32, gt=0)
    """Samples in one generation batch; when one ends, the next one starts in its slot."""
    kv_cache_gb: float = Field(8.0, gt=0)
    """Limit of the KV cache in GB; the batch shrinks if `parallel_samples` rows of max_length tokens need more. It
    follows from the model's shape, not from free memory, so that samples are identical on every machine."""
    shard_samples: int = Field(64, gt=0)
    """Samples per shard, the unit of retry."""
    top_k: int = Field(20, ge=0)
    """Sample from the top k tokens; 0 disables the limit."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens whose total probability reaches this value (nucleus sampling)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling; below 1 makes likely tokens more likely."""
    max_attempts: int = Field(8, gt=0)
    """Maximum number of attempts per sample; a malformed sample is drawn again."""
    require_known_label: bool = True
    """Reject samples whose answer is not a label of their task; ignored for free-text tasks."""
    require_known_question: bool = True
    """Reject samples whose text does not end with their task's question; ignored for tasks without one."""
    balance_labels: bool = True
    """Keep the label frequencies of samples close to those of the task's train rows, since sampling with a small top_k
    favours one label. A surplus sample of a label is redrawn, and used if the attempts yield no other."""
    min_yield: float = Field(0.5, ge=0, le=1)
    """Minimum fraction of the requested samples that must be well-formed and distinct; the run stops below it."""


class Budget(Section):
    """Number of rows of earlier tasks that are replayed with a new task."""

    gamma: float = Field(0.2, ge=0)
    """Replayed rows of all earlier tasks as a fraction of the new task's train rows, split equally over tasks."""
    min_replay: int = Field(0, ge=0)
    """Minimum number of replayed rows per earlier task; useful if the new task is small."""

    def per_task(self, new_rows: int, earlier: int) -> int:
        """Return the number of rows per earlier task: floor(ceil(gamma * new_rows) / earlier), at least min_replay."""
        return max(math.ceil(self.gamma * new_rows) // earlier, self.min_replay) if earlier else 0


class StageBase(Section):
    """Fields of every stage kind."""

    kind: str
    task: int

    @property
    def name(self) -> str:
        """Folder name of the stage below its task."""
        return self.kind


class Train(StageBase):
    """Train one model, in a gang, on the train rows of `data`; their dev rows select the best weights."""

    kind: Literal["train"] = "train"
    task: int
    data: tuple[int, ...]
    """Tasks whose train rows are used."""
    init: StageRef | None = None
    """Stage whose model this one starts from; None starts from the backbone."""
    learner: str | None = None
    """Name of one of the method's learners; None is the learner whose model makes the predictions."""
    replay: tuple[int, ...] = ()
    """Earlier tasks whose train rows are replayed in part."""
    replay_rows: int = 0
    """Replayed rows per task, chosen by the run's seed."""
    budget: Budget | None = None
    """Replaces `replay_rows` by a number computed from the rows of the stage's own task."""
    samples: StageRef | None = None
    """Generate stage whose pseudo-samples are added to the train rows."""
    role: Literal["train", "free", "try", "invrat"] = "train"
    """Folder name below the task: train (its final model), free (a model used only in the vote), try (a candidate) or
    invrat (a model that extracts rationales)."""
    trial: int | None = None
    """Number of this stage among several of the same role."""
    settings: TrainConfig | None = None
    """Training settings that replace those of the task."""
    frozen: StageRef | None = None
    """Vote or Choose stage whose critical units are frozen."""
    frozen_units: tuple[tuple[int, int], ...] = ()
    """(layer, unit) pairs that are frozen."""

    @property
    def name(self) -> str:
        """See StageBase."""
        return self.role if self.trial is None else f"{self.role}-{self.trial}"

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return tuple(ref for ref in (self.init, self.samples, self.frozen) if ref is not None)


class Generate(StageBase):
    """Generate pseudo-samples of earlier tasks, in shards, with the model that has learned them."""

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
    """Settings of the vote on critical components (see models/cci.py)."""

    level: Literal["block", "group", "head"] = "block"
    """Unit of freezing: layers, groups of heads that share keys (heads, if no heads do), or single heads."""
    beta: int = Field(80, ge=0, lt=100)
    """Percentile of an attention row above which a token counts as attended."""
    attention_scope: Literal["context", "all"] = "context"
    """Tokens used as queries and keys: those of the text only, or also those of question and answer."""
    max_examples: int = Field(200, gt=0)
    """Maximum number of rows per voting task: its first dev rows, or train rows if it has no dev rows."""
    rationales: Literal["human", "invrat", "gradient"] = "human"
    """Source of rationales: the data (human); a model trained to extract them, for tasks without any (invrat, see
    methods/invrat.py); or gradient x input of the model before the task (gradient)."""
    rationale_share: float = Field(0.2, gt=0, le=1)
    """Fraction of a text's tokens in a rationale with rationales=gradient."""
    voting_tasks: Literal["previous", "all"] = "previous"
    """Tasks whose rows vote: the previous one, or all earlier ones."""
    top_k: int = Field(12, gt=0)
    """Number of groups or heads that each row votes for, and that are frozen; with level=block it is one."""
    shard_samples: int = Field(25, gt=0)
    """Rows per shard, the unit of retry."""
    min_margin: float = Field(0.05, ge=0, le=1)
    """Minimum margin between the last frozen and the first trained unit, in votes as a fraction of the rows; below it a
    warning reports that the vote is not decisive."""


class Rationalise(StageBase):
    """Extract rationales of the voting rows of a task, in shards, with the best of several models trained for it."""

    kind: Literal["rationalise"] = "rationalise"
    task: int
    models: tuple[StageRef, ...]
    """Train stages that differ in their seed; the one with the highest dev accuracy is used."""
    learner: str = "invrat"
    """Name of the method's learner that trained them."""
    sources: tuple[int, ...]
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return self.models


class Record(StageBase):
    """Record, in shards, which tokens of the voting rows the model before the task attends to, as bits."""

    kind: Literal["record"] = "record"
    task: int
    model: StageRef
    sources: tuple[int, ...]
    """Tasks whose rows vote."""
    rationales: tuple[StageRef, ...] = ()
    """Rationalise stages of the sources, with rationales=invrat."""
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model, *self.rationales)


class Vote(StageBase):
    """Compare, in shards, the attention of a freely trained model with the record, and select critical units."""

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
    """Score, in shards, models trained with different frozen units; the units of the best one are critical."""

    kind: Literal["choose"] = "choose"
    task: int
    model: StageRef
    """Model from which the candidates started."""
    candidates: tuple[StageRef, ...]
    units: tuple[tuple[int, int], ...]
    """The (layer, unit) frozen in each candidate."""
    sources: tuple[int, ...]
    """Tasks whose dev rows are scored (train rows, if there are none)."""
    vote: VoteConfig

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model, *self.candidates)


class Evaluate(StageBase):
    """Score, in shards, the test rows of some tasks with one model."""

    kind: Literal["evaluate"] = "evaluate"
    task: int
    model: StageRef
    tasks: tuple[int, ...]
    previous: StageRef | None = None
    """Evaluate stage whose scores are reused for the other seen tasks, if their models did not change."""
    without: tuple[str, ...] = ()
    """Parts of the learner to disable for an extra score of `task`: an ablation without retraining."""

    @property
    def inputs(self) -> tuple[StageRef, ...]:
        """Stages that must be done before this one."""
        return (self.model,) if self.previous is None else (self.model, self.previous)


Stage = Train | Generate | Rationalise | Record | Vote | Choose | Evaluate


def ref(stage: Stage) -> StageRef:
    """Return the reference to a stage."""
    return StageRef(task=stage.task, stage=stage.name)


def digest_of(data: Any) -> str:
    """Return the sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flattened
