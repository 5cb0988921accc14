"""Shards of the stages that read the voting rows."""

from dataclasses import dataclass

from cl_dist.data.votes import voting_rows
from cl_dist.stage import Choose, Rationalise, Record, Vote
from cl_dist.stages.stage_job import Job, task_data


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Voting rows start..stop-1 of a task."""

    source: int
    start: int
    stop: int


def shards(job: Job) -> list[Shard]:
    """Return the stage's shards, which depend on science settings only, never on the workers."""
    stage = job.stage
    assert isinstance(stage, Rationalise | Record | Vote | Choose)
    return [
        Shard(source, start, min(start + stage.vote.shard_samples, count))
        for source in stage.sources
        for count in [len(voting_rows(task_data(job, source), stage.vote.max_examples))]
        for start in range(0, count, stage.vote.shard_samples)
    ]
