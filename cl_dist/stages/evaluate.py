"""Worker side of Evaluate: scores shards of test rows and merges them into one scores.json."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cl_dist.data.rows import Row, TaskData
from cl_dist.data.tasks import TaskConfig
from cl_dist.data.text_metrics import TEXT_METRICS, joint_state, turn_of
from cl_dist.errors import DataError
from cl_dist.metrics import accuracy, f1_macro, majority_accuracy
from cl_dist.stage import Evaluate
from cl_dist.stages.predict import Predictor
from cl_dist.stages.shards import ShardedKind
from cl_dist.stages.stage_job import Job, task_data

SCORES = "scores.json"


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Test rows start..stop-1 of a task, scored with a part of the learner switched off, or with all parts ("")."""

    task: int
    without: str
    start: int
    stop: int


Scored = dict[str, Any]
"""Per row of a shard: answers as text, or predictions (class indices) with their logits (float32 bytes in hexadecimal),
and the learner's observations (in any row order, since only their mean is used)."""


def shards(job: Job) -> list[Shard]:
    """Return the stage's shards, which depend on science settings only, never on the workers."""
    stage = job.stage
    assert isinstance(stage, Evaluate)
    wanted = [(task, "") for task in stage.tasks] + [(stage.task, part) for part in stage.without]
    return [
        Shard(task, without, start, min(start + job.evaluate.shard_rows, len(task_data(job, task).test)))
        for task, without in wanted
        for start in range(0, len(task_data(job, task).test), job.evaluate.shard_rows)
    ]


class EvaluateWorker:
    """Loads the stage's model and scores one shard at a time."""

    def __init__(self, job: Job) -> None:
        self._job, self._predictor = job, Predictor(job)

    def run(self, shard: Shard) -> Scored:
        """Score a shard; the result does not depend on the worker."""
        rows = task_data(self._job, shard.task).test[shard.start : shard.stop]
        if self._predictor.writes:
            return {"answers": self._predictor.answers(shard.task, rows), "observed": {}}
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
    """Join the shards in row order, and write scores.json and the predictions of every task to out."""
    stage = job.stage
    assert isinstance(stage, Evaluate)
    parts: dict[tuple[int, str], list[tuple[Shard, Scored]]] = {}
    for shard, scored in sorted(results, key=lambda result: result[0]):
        parts.setdefault((shard.task, shard.without), []).append((shard, scored))
    scores: dict[str, Any] = {"tasks": {}, "without": {}}
    (out / "predictions").mkdir(exist_ok=True)
    for (task, without), scored_parts in parts.items():
        data = task_data(job, task)
        predictions = [text for _, scored in scored_parts for text in _answers(scored, data)]
        truth = [row.label for row in data.test]
        numbers = score_answers(job.tasks[task], data.labels, data.test, predictions)
        if without:
            scores["without"][without] = numbers
            continue
        output = [text for _, scored in scored_parts for text in scored["logits" if "logits" in scored else "answers"]]
        certain = [p for _, scored in scored_parts for p in _probabilities(scored)]
        observed = [scored["observed"] for _, scored in scored_parts]
        scores["tasks"][str(task)] = numbers | {
            "rows": len(truth),
            "majority": majority_accuracy([row.label for row in data.train], truth),
            "output_sha256": hashlib.sha256("\n".join(output).encode()).hexdigest(),
            "observed": {name: _mean(row for part in observed for row in part[name]) for name in observed[0]},
        }
        lines = [
            json.dumps({"id": row.id, "label": row.label, "prediction": prediction, **p}, ensure_ascii=False)
            for row, prediction, p in zip(data.test, predictions, certain, strict=True)
        ]
        (out / "predictions" / f"{data.id}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    (out / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf8")


def score_answers(task: TaskConfig, labels: Sequence[str], rows: Sequence[Row], answers: list[str]) -> dict[str, Any]:
    """Return the scores of the answers to some rows; "score" is the entry of the accuracy matrix R.

    Free text has no classes: its f1_macro is None, and "accuracy" counts exact matches of the text.
    """
    truth = [row.label for row in rows]
    numbers: dict[str, Any] = {"accuracy": accuracy(truth, answers), "f1_macro": None}
    if task.output == "text":
        wanted = {"exact_match", "f1", task.metric} - {"joint_state"}
        numbers |= {name: TEXT_METRICS[name](truth, answers) for name in wanted}
        if task.metric == "joint_state":
            turns = [turn_of(row.id) for row in rows]
            dialogues = [turn[0] for turn in turns if turn is not None]
            if len(dialogues) < len(rows):
                alone = rows[turns.index(None)].id
                raise DataError(f"task {task.id}: joint_state needs ids <dialogue>-<turn number>, not {alone!r}")
            numbers |= {"joint_state": joint_state(dialogues, truth, answers)}
            numbers |= {"turn_state": TEXT_METRICS["turn_state"](truth, answers)}
    else:
        known = set(labels)
        numbers["f1_macro"] = f1_macro(truth, [text if text in known else "" for text in answers])
    return numbers | {"score": numbers[task.metric]}


def _answers(scored: Scored, data: TaskData) -> list[str]:
    answers: list[str] = scored["answers"] if "answers" in scored else [data.labels[k] for k in scored["predictions"]]
    return answers


def _probabilities(scored: Scored) -> list[dict[str, float]]:
    """Return per row {"probability": that of the prediction}; empty for generated answers and logits that diverged."""
    if "logits" not in scored:
        return [{} for _ in scored["answers"]]
    found: list[dict[str, float]] = []
    for text in scored["logits"]:
        logits_K = np.frombuffer(bytes.fromhex(text), dtype=np.float32).astype(np.float64)
        largest = 1 / np.exp(logits_K - logits_K.max()).sum()
        found.append({"probability": round(float(largest), 6)} if np.isfinite(logits_K).all() else {})
    return found


def _mean(rows: Iterable[Any]) -> Any:
    """Return the mean over rows of equally nested lists of numbers."""
    values = torch.tensor(list(rows), dtype=torch.float64)
    return values.mean(0).tolist()


KIND = ShardedKind(shards, EvaluateWorker, merge)
