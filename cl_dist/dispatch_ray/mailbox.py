"""Mailbox between the driver and the gang: an actor that passes stages to the gang and events to the driver."""

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
    """A Train stage for the gang."""

    number: int
    job: Job
    out: str
    logs: str
    progress_timeout_s: float


class Mailbox:
    """Passes stages to the gang and events back. A separate actor, so it outlives a crashed gang."""

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
        """Register a rank that has started, and the gang's size, which may shrink if it is elastic.

        Returns variables for the rank's environment.
        """
        self._slots[slot.rank] = slot
        self._slots = {rank: known for rank, known in self._slots.items() if rank < size}
        self._starts += slot.rank == 0
        return self._secrets

    async def fetch(self, after: int) -> StageTicket | str:
        """Return the next stage later than `after`, 'closed' at the end, or 'wait' to call again."""
        for _ in range(100):
            if self._closed:
                return "closed"
            if self._ticket is not None and self._ticket.number > max(after, self._done):
                return self._ticket
            await asyncio.sleep(POLL_S)
        return "wait"

    async def post(self, ticket: StageTicket) -> None:
        """Post a stage for the gang."""
        self._ticket, self._error, self._request = ticket, None, ""

    @ray.method(enable_task_events=True)
    async def working(self, number: int) -> None:
        """Run as long as a stage, to show it by name on Ray's dashboard."""
        while self._done < number != self._saved and self._error is None and not self._closed:
            await asyncio.sleep(10 * POLL_S)

    async def request(self, due: SaveRequest) -> None:
        """Request that the gang saves the current stage, or saves and leaves it."""
        self._request = due

    async def take_request(self) -> SaveRequest:
        """Return the pending request; a save request is returned once."""
        pending = self._request
        self._request = "stop" if pending == "stop" else ""
        return pending

    async def saved(self, number: int) -> None:
        """Record that a stage was saved and left on request, and withdraw it."""
        self._saved, self._ticket = number, None

    async def tell(self, event: dict[str, Any]) -> None:
        """Pass on a progress event."""
        self._events.append(event)

    async def done(self, number: int) -> None:
        """Record that a stage is finished on all ranks."""
        self._done = max(self._done, number)

    async def fail(self, error: ClDistError) -> None:
        """Record an error that a restart would not fix, and withdraw the stage."""
        self._error, self._ticket = self._error or error, None

    async def news(self) -> dict[str, Any]:
        """Return the state of the gang and the new events; each event is returned once."""
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
        """End the gang's loop."""
        self._closed = True
