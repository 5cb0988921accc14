"""Dispatcher that runs stages in this process, on one worker; for debugging and tests."""

import os
import signal
from pathlib import Path

import torch

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

    def __init__(self, threads: int | None = None) -> None:
        """Set torch's threads until `close`; None, or OMP_NUM_THREADS in the environment, leaves their number as it is.

        On a busy machine, torch's default of a thread per core slows a small run down many times.
        """
        self._threads = torch.get_num_threads()
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # as in Ray's workers: see dispatch_ray.cluster
        if threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)

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
        """Restore the number of threads."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
