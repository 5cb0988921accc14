"""The mailbox between the driver and the gang: an actor that carries stages one way and news the other."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from cl_dist.dispatch_ray.cluster import WorkerSlot
from cl_dist.errors import ClDistError
from cl_dist.stages.stage_job import Job, SaveRequest

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class StageTicket:
    """A Train stage on its way to the gang."""

    number: int
    job: Job
    out: str
    logs: str
    progress_timeout_s: float


class Mailbox:
    """Carries stages to the gang and news back. Lives in an actor of its own, so it outlives a crashed gang."""

    def __init__(self, secrets: Mapping[str, str] | None = None) -> None:
        self._secrets = dict(secrets or {})
        self._ticket: StageTicket | None = None
        self._done, self._closed = -1, False
        self._error: ClDistError | None = None
        self._events: list[dict[str, Any]] = []
        self._slots: dict[int, WorkerSlot] = {}
        self._starts = 0
        self._request: SaveRequest = ""
        self._saved = -1

    async def hello(self, slot: WorkerSlot, size: int) -> dict[str, str]:
        """Take note of a rank that has started, in a gang of some size: an elastic one may have been larger.

        Return what belongs into its environment.
        """
        self._slots[slot.rank] = slot
        self._slots = {rank: known for rank, known in self._slots.items() if rank < size}
        self._starts += slot.rank == 0
        return self._secrets

    async def fetch(self, after: int) -> StageTicket | str:
        """Return the stage to work on, once there is one later than `after`; 'closed', or 'wait' to ask again."""
        for _ in range(100):
            if self._closed:
                return "closed"
            if self._ticket is not None and self._ticket.number > max(after, self._done):
                return self._ticket
            await asyncio.sleep(POLL_S)
        return "wait"

    async def post(self, ticket: StageTicket) -> None:
        """Hand a stage to the gang."""
        self._ticket, self._error, self._request = ticket, None, ""

    @ray.method(enable_task_events=True)
    async def working(self, number: int) -> None:
        """Last as long as a stage does: under the stage's name, for Ray's dashboard."""
        while self._done < number != self._saved and self._error is None and not self._closed:
            await asyncio.sleep(10 * POLL_S)

    async def request(self, due: SaveRequest) -> None:
        """Ask the gang to save the stage it is at, or to save and leave it."""
        self._request = due

    async def take_request(self) -> SaveRequest:
        """Return what it is asked for; to save only once."""
        pending = self._request
        self._request = "stop" if pending == "stop" else ""
        return pending

    async def saved(self, number: int) -> None:
        """Take note that a stage was left, saved, because it was asked for; nobody shall go on with it."""
        self._saved, self._ticket = number, None

    async def tell(self, event: dict[str, Any]) -> None:
        """Pass on a progress event."""
        self._events.append(event)

    async def done(self, number: int) -> None:
        """Take note that a stage is finished on all ranks."""
        self._done = max(self._done, number)

    async def fail(self, error: ClDistError) -> None:
        """Take note of an error that a restart would not cure, and take the stage back: nobody shall try it again."""
        self._error, self._ticket = self._error or error, None

    async def news(self) -> dict[str, Any]:
        """Return what happened; events are handed out once."""
        events, self._events = self._events, []
        slots = [self._slots[rank] for rank in sorted(self._slots)]
        return {
            "events": events,
            "done": self._done,
            "saved": self._saved,
            "error": self._error,
            "slots": slots,
            "starts": self._starts,
        }

    async def close(self) -> None:
        """Let the gang go home."""
        self._closed = True
