"""Checkpoint policy of a Train stage: about once a second, all ranks agree on requests of the driver and the clock."""

import time
from collections.abc import Callable

from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.world import World
from cl_dist.stages.checkpoint import Writer
from cl_dist.stages.stage_job import SaveRequest

POLL_S, WRITING_S = 1.0, 0.1
"""Seconds between agreements of the ranks, and while a checkpoint is being written."""


class SavePolicy:
    """Decides after each step whether to save or stop. A collective at some steps, the same on all ranks."""

    def __init__(
        self, config: EngineConfig, world: World, poll_request: Callable[[], SaveRequest], first: int, writer: Writer
    ) -> None:
        """Take the intervals, the driver's requests, the step at which the stage starts, and the checkpoint writer."""
        self._world, self._poll_request, self._writer = world, poll_request, writer
        self._every, self._minutes = config.checkpoint_steps, config.checkpoint_minutes
        self._saved = self._polled = time.monotonic()
        self._next_poll, self._polled_step = first + 1, first

    def due(self, done: int) -> SaveRequest:
        """Return the action due after `done` steps of the stage; commits a checkpoint whose files are written."""
        due: SaveRequest = "save" if self._every and done % self._every == 0 else ""
        if done >= self._next_poll:
            answers = self._world.gather((*self._own_request(done), self._writer.is_written))
            wanted, self._next_poll, _ = answers[0]
            due = "stop" if wanted == "stop" else due or wanted
            if all(is_written for _, _, is_written in answers):
                self._writer.commit()
        if due:
            self._saved, self._next_poll = (
                time.monotonic(),
                done + 1,
            )  # to commit the checkpoint soon
        return due

    def _own_request(self, done: int) -> tuple[SaveRequest, int]:
        """Return this rank's request and the step of the next poll; only rank 0's are used."""
        if self._world.rank:
            return "", 0
        now = time.monotonic()
        per_step = (now - self._polled) / max(done - self._polled_step, 1)
        self._polled, self._polled_step = now, done
        wait_s = WRITING_S if self._writer.is_pending else POLL_S
        again = done + max(1, min(int(wait_s / max(per_step, 1e-6)), 1000))
        if wanted := self._poll_request():
            return wanted, again
        is_late = self._minutes > 0 and now - self._saved > 60 * self._minutes
        return "save" if is_late else "", again
