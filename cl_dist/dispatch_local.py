"""Runs stages in this process, on one worker: for debugging and for most tests."""

from pathlib import Path

from cl_dist.stages import evaluate, train
from cl_dist.stages.job import Job
from cl_dist.tracking import Tracker


class LocalDispatcher:
    """One worker, no Ray."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        if job.stage.kind == "train":
            train.run(job, Path(out), tracker.event)
            return
        scorer = evaluate.Scorer(job)
        evaluate.merge(job, [(shard, scorer.score(shard)) for shard in evaluate.shards(job)], Path(out))

    def close(self) -> None:
        """Nothing is kept between stages."""
