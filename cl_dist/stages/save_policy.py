"""When a Train stage is saved: all ranks agree, about once a second, on what rank 0's clock and the driver want."""

import time
from collections.abc import Callable

from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.world import World
from cl_dist.stages.checkpoint import Writer
from cl_dist.stages.stage_job import SaveRequest

POLL_S, WRITING_S = 1.0, 0.1
"""How often ranks agree, and how often while a checkpoint is being written."""


class SavePolicy:
    """Says after each step whether to save, and whether to stop. A collective at some steps, the same on all ranks."""

    def __init__(
        self, config: EngineConfig, world: World, poll_request: Callable[[], SaveRequest], first: int, writer: Writer
    ) -> None:
        """Take how often, who else may ask, the step that the stage goes on from, and what is still being written."""
        self._world, self._poll_request, self._writer = world, poll_request, writer
        self._every, self._minutes = config.checkpoint_steps, config.checkpoint_minutes
        self._saved = self._polled = time.monotonic()
        self._next_poll, self._polled_step = first + 1, first

    def due(self, done: int) -> SaveRequest:
        """Return what is due after `done` steps of the stage; what has been written by then becomes a checkpoint."""
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
            )  # the sooner files become a checkpoint, the better
        return due

    def _own_request(self, done: int) -> tuple[SaveRequest, int]:
        """Return what this rank would do, and after how many steps to ask again; rank 0's word counts."""
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
