"""Worker side of Choose: scores candidate models, trained with different units frozen, on dev rows."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.data.votes import CRITICAL, voting_rows
from cl_dist.stage import Choose
from cl_dist.stages import voting_shards
from cl_dist.stages.predict import Predictor
from cl_dist.stages.shards import ShardedKind
from cl_dist.stages.stage_job import Job, task_data


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Rows scored with one candidate."""

    candidate: int
    rows: voting_shards.Shard


def shards(job: Job) -> list[Shard]:
    """Return the stage's shards, which depend on science settings only, never on the workers."""
    assert isinstance(job.stage, Choose)
    return [Shard(number, rows) for number in range(len(job.stage.candidates)) for rows in voting_shards.shards(job)]


class ChooseWorker:
    """Loads the model of one candidate at a time."""

    def __init__(self, job: Job) -> None:
        self._job, self._loaded = job, -1

    def run(self, shard: Shard) -> int:
        """Return the number of correct answers to a shard's rows."""
        assert isinstance(self._job.stage, Choose)
        if shard.candidate != self._loaded:
            self._predictor: Predictor | None = None  # never two models in memory
            folder = self._job.folder(self._job.stage.candidates[shard.candidate])
            self._predictor = Predictor(replace(self._job, chain=(*self._job.chain, str(folder))))
            self._loaded = shard.candidate
        assert self._predictor is not None
        where = shard.rows
        rows = voting_rows(task_data(self._job, where.source), self._job.stage.vote.max_examples)[
            where.start : where.stop
        ]
        answers = self._predictor.answers(where.source, rows)
        return sum(answer == row.label for answer, row in zip(answers, rows, strict=True))


def merge(job: Job, results: Iterable[tuple[Shard, int]], out: Path) -> None:
    """Write critical.json: the unit whose candidate has the best mean accuracy over tasks; of equals, the first."""
    stage = job.stage
    assert isinstance(stage, Choose)
    right = [dict.fromkeys(stage.sources, 0) for _ in stage.candidates]
    for shard, count in results:
        right[shard.candidate][shard.rows.source] += count
    sizes = {task: len(voting_rows(task_data(job, task), stage.vote.max_examples)) for task in stage.sources}
    scores = [sum(found[task] / sizes[task] for task in stage.sources) / len(stage.sources) for found in right]
    best = stage.units[scores.index(max(scores))]
    tried = [{"unit": list(unit), "accuracy": score} for unit, score in zip(stage.units, scores, strict=True)]
    result = {"level": stage.vote.level, "chosen": [list(best)], "tried": tried}
    (out / CRITICAL).write_text(json.dumps(result, indent=1), encoding="utf8")


KIND = ShardedKind(shards, ChooseWorker, merge)
