"""Runs stages in this process, on one worker: for debugging and for most tests."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cl_dist.errors import StoppedError
from cl_dist.stages import train
from cl_dist.stages.job import Job
from cl_dist.stages.shards import SHARDED, Finished
from cl_dist.tracking import Tracker


class LocalDispatcher:
    """One worker, no Ray."""

    _stop: signal.Signals | None = None
    """What asked to stop while a stage came to its end; to be acted upon before the next one."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        if self._stop is not None:
            stop, self._stop = self._stop, None
            signal.raise_signal(stop)
        if job.stage.kind == "train":
            with _signals_noted() as noted:
                try:
                    train.run(job, Path(out), tracker.event, lambda: "stop" if noted else "")
                    self._stop = noted[0] if noted else None
                    return
                except StoppedError as stopped:
                    tracker.event({"event": "saved", "message": str(stopped)})
            signal.raise_signal(noted[0])  # now for those who handled it before
        finished = Finished(job, Path(out))
        worker = SHARDED[job.stage.kind].worker(job) if finished.missing else None
        for shard in reversed(finished.missing):
            assert worker is not None
            finished.keep(shard, worker.run(shard))
        finished.merge()

    def close(self) -> None:
        """Nothing is kept between stages."""


@contextmanager
def _signals_noted() -> Iterator[list[signal.Signals]]:
    """Note Ctrl-C and SIGTERM instead of acting on them, so that a step is not cut in two."""
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, _: noted.append(signal.Signals(received)))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
