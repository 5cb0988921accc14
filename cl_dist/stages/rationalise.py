"""Worker side of Rationalise: the selector of the best InvRat model extracts rationales of the voting rows."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cl_dist.data.environments import RationaleExamples
from cl_dist.data.rationales import Span, joined
from cl_dist.data.votes import RATIONALES, voting_rows
from cl_dist.errors import CheckpointError
from cl_dist.learners.invrat import Invrat
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel.world import World
from cl_dist.stage import Rationalise
from cl_dist.stages.build import build_learner
from cl_dist.stages.shards import ShardedKind
from cl_dist.stages.stage_job import Job, task_data
from cl_dist.stages.voting_shards import Shard, shards

FOUND = "rationalise.json"

Marked = list[tuple[str, list[Span]]]
"""Row id, and the [start, end) character spans of its rationale."""


def dev_scores(job: Job) -> list[float]:
    """Return the dev accuracy of each of the stage's models, or minus the train loss without dev rows.

    Raises:
        CheckpointError: If a model's train.json is missing or damaged.
    """
    assert isinstance(job.stage, Rationalise)
    found = []
    for model in job.stage.models:
        path = job.folder(model) / "train.json"
        try:
            metrics = json.loads(path.read_text(encoding="utf8"))["metrics"]
            found.append(float(metrics.get("dev/accuracy", -metrics["train/agnostic"])))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: missing or damaged ({error}); remove its folder and resume") from None
    return found


class RationaliseWorker:
    """Loads the best model and extracts rationales."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.stage, Rationalise)
        self._job, self._vote, self._device = job, job.stage.vote, World.current().device
        scores = dev_scores(job)
        best = job.stage.models[scores.index(max(scores))]
        learner = build_learner(replace(job, chain=(str(job.folder(best)),)))
        assert isinstance(learner, Invrat)
        self._model = learner.model.to(self._device).eval()
        self._learner, self._tokenizer = learner, load_tokenizer(job.model)

    def run(self, shard: Shard) -> Marked:
        """Return the rationales of a shard's rows, each encoded alone."""
        data = task_data(self._job, shard.source)
        chosen = voting_rows(data, self._vote.max_examples)[shard.start : shard.stop]
        length = self._learner.config.invrat.train.max_length
        rows = self._learner.rows(self._tokenizer, length, training=False)
        assert isinstance(rows, RationaleExamples)
        rows.add(shard.source, data, chosen)
        marked: Marked = []
        for number, row in enumerate(chosen):
            (mask_L,) = self._model.select(rows.batch([number], self._device)).tolist()
            spans = [span for span, is_chosen in zip(rows.offsets[number], mask_L, strict=False) if is_chosen]
            marked.append((row.id, joined(spans)))
        return marked


def merge(job: Job, results: Iterable[tuple[Shard, Marked]], out: Path) -> None:
    """Write the spans of all rows, and the index and scores of the models, to out."""
    assert isinstance(job.stage, Rationalise)
    lines = [line for _, marked in sorted(results, key=lambda result: result[0]) for line in marked]
    (out / RATIONALES).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    scores = dev_scores(job)
    result: dict[str, Any] = {"standings": scores, "chosen": scores.index(max(scores)), "rows": len(lines)}
    result["empty"] = sum(not spans for _, spans in lines)
    (out / FOUND).write_text(json.dumps(result, indent=1), encoding="utf8")


KIND = ShardedKind(shards, RationaliseWorker, merge)
