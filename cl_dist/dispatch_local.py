"""Dispatcher that runs stages in this process, on one worker; for debugging and tests."""

import signal
from pathlib import Path

from cl_dist.errors import StoppedError
from cl_dist.kinds import kind_of
from cl_dist.run_events import Tracker
from cl_dist.stages import train
from cl_dist.stages.shards import ShardStore, sharded
from cl_dist.stages.stage_job import Job, SaveRequest
from cl_dist.stopping import signals_noted


class LocalDispatcher:
    """One worker, no Ray."""

    _stop: signal.Signals | None = None
    """Signal that arrived while a stage finished; raised before the next stage."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        if self._stop is not None:
            stop, self._stop = self._stop, None
            signal.raise_signal(stop)
        if kind_of(job.stage).worker is None:
            with signals_noted() as noted:

                def request() -> SaveRequest:
                    if noted:
                        tracker.event({"event": "stopping"})
                    return "stop" if noted else ""

                try:
                    train.run(job, Path(out), tracker.event, request)
                    self._stop = noted[0] if noted else None
                    return
                except StoppedError as error:
                    stopped = error
            signal.raise_signal(noted[0])  # the previous handler receives it now
            raise stopped  # the handler returned, but this stage cannot continue
        finished = ShardStore(job, Path(out))
        worker = sharded(job.stage.kind).worker(job) if finished.missing else None
        total = len(finished.shards)
        for shard in reversed(finished.missing):
            assert worker is not None
            finished.keep(shard, worker.run(shard))
            tracker.event({"event": "step", "step": total - len(finished.missing), "total_steps": total})
        finished.merge()

    def close(self) -> None:
        """Do nothing: no state persists between stages."""
