"""Runs stages in this process, on one worker: for debugging and for most tests."""

from pathlib import Path

from cl_dist.stages import train
from cl_dist.stages.job import Job
from cl_dist.stages.shards import SHARDED
from cl_dist.tracking import Tracker


class LocalDispatcher:
    """One worker, no Ray."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        if job.stage.kind == "train":
            train.run(job, Path(out), tracker.event)
            return
        kind = SHARDED[job.stage.kind]
        worker = kind.worker(job)
        kind.merge(job, [(shard, worker.run(shard)) for shard in reversed(kind.cut(job))], Path(out))

    def close(self) -> None:
        """Nothing is kept between stages."""
