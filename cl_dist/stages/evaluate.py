"""Worker side of an Evaluate stage: rows cut into shards that any worker may score, merged into one scores.json."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_dist.metrics import accuracy, f1_macro, majority_accuracy
from cl_dist.stage import Evaluate
from cl_dist.stages.job import Job, task_data
from cl_dist.stages.predict import Predictor

SCORES = "scores.json"


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Test rows start..stop-1 of a task, scored with one part of the learner switched off, or none ("")."""

    task: int
    without: str
    start: int
    stop: int


Scored = dict[str, Any]
"""Per row of a shard: predictions (class numbers), logits (float32 bytes in hexadecimal), what the learner observed
(in any row order, since only its mean is used)."""


def shards(job: Job) -> list[Shard]:
    """Cut the stage into shards. They depend on the science settings alone, never on the workers."""
    stage = job.stage
    assert isinstance(stage, Evaluate)
    wanted = [(task, "") for task in stage.tasks] + [(stage.task, part) for part in stage.without]
    return [
        Shard(task, without, start, min(start + job.evaluate.shard_rows, len(task_data(job, task).test)))
        for task, without in wanted
        for start in range(0, len(task_data(job, task).test), job.evaluate.shard_rows)
    ]


class Scorer:
    """Holds the stage's model and scores one shard after the other."""

    def __init__(self, job: Job) -> None:
        self._job, self._predictor = job, Predictor(job)

    def run(self, shard: Shard) -> Scored:
        """Score a shard; its numbers do not depend on who scores it."""
        rows = task_data(self._job, shard.task).test[shard.start : shard.stop]
        observed: dict[str, list[Any]] = {}

        def observe() -> None:
            for name, value in self._predictor.learner.observe().items():
                observed.setdefault(name, []).extend(value.cpu().tolist())

        logits = self._predictor.logits(shard.task, rows, shard.without or None, observe)
        return {
            "predictions": [int(row_K.argmax()) for row_K in logits],
            "logits": [row_K.numpy().tobytes().hex() for row_K in logits],
            "observed": observed,
        }


def merge(job: Job, results: Iterable[tuple[Shard, Scored]], out: Path) -> None:
    """Join the shards in row order and write scores.json and predictions of every task to out."""
    stage = job.stage
    assert isinstance(stage, Evaluate)
    parts: dict[tuple[int, str], list[tuple[Shard, Scored]]] = {}
    for shard, scored in sorted(results, key=lambda result: result[0]):
        parts.setdefault((shard.task, shard.without), []).append((shard, scored))
    scores: dict[str, Any] = {"tasks": {}, "without": {}}
    (out / "predictions").mkdir(exist_ok=True)
    for (task, without), scored_parts in parts.items():
        data = task_data(job, task)
        predictions = [data.labels[k] for _, scored in scored_parts for k in scored["predictions"]]
        truth = [row.label for row in data.test]
        numbers = {"accuracy": accuracy(truth, predictions), "f1_macro": f1_macro(truth, predictions)}
        if without:
            scores["without"][without] = numbers
            continue
        logits = [text for _, scored in scored_parts for text in scored["logits"]]
        observed = [scored["observed"] for _, scored in scored_parts]
        scores["tasks"][str(task)] = numbers | {
            "rows": len(truth),
            "majority": majority_accuracy([row.label for row in data.train], truth),
            "logits_sha256": hashlib.sha256("\n".join(logits).encode()).hexdigest(),
            "observed": {name: _mean(row for part in observed for row in part[name]) for name in observed[0]},
        }
        lines = [
            json.dumps({"id": row.id, "label": row.label, "prediction": prediction}, ensure_ascii=False)
            for row, prediction in zip(data.test, predictions, strict=True)
        ]
        (out / "predictions" / f"{data.id}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    (out / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf8")


def _mean(rows: Iterable[Any]) -> Any:
    """Return the mean over rows of equally nested lists of numbers."""
    values = torch.tensor(list(rows), dtype=torch.float64)
    return values.mean(0).tolist()
