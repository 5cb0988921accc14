"""Heartbeats of ranks and actors in their logs, and excerpts of the logs for error messages."""

import faulthandler
import logging
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

log = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
TAIL_LINES = 6
STARTED = "train start"
"""Message of train.run when a stage starts or resumes."""


class Watchdog:
    """Ends the process with its stacks in a log if heartbeats stop for too long; logs one heartbeat per second.

    A context manager; loading counts too. A rank that hangs in a collective hangs with all others: each ends itself,
    and the gang restarts.
    """

    def __init__(self, timeout_s: float, file: Any) -> None:
        """Take the maximum seconds between two heartbeats (0: no limit), and the open log file."""
        self._timeout_s, self._file, self._noted = timeout_s, file, 0.0

    def __enter__(self) -> Self:
        self._watch()
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        if self._timeout_s:
            faulthandler.dump_traceback_later(self._timeout_s + HEARTBEAT_S, exit=True, file=self._file)

    def __call__(self, step: int) -> None:
        """Record a heartbeat after some number of steps."""
        if time.monotonic() - self._noted > HEARTBEAT_S:
            self._noted = time.monotonic()
            self._watch()  # each watch is a new thread: too expensive for every step
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            log.info("alive step=%d peak_memory_gb=%.2f", step, peak_gb)


def log_of(logs: Path, number: int, who: str = "rank") -> Path:
    """Return the log file of a rank of the gang, or of an actor of the pool."""
    return logs / f"{who}-{number}.log"


def log_tails(logs: Path, numbers: Iterable[int], who: str = "rank") -> str:
    """Return the ends of ranks' logs, or their stacks after a hang, ordered by when each rank last logged."""
    known = [path for path in (log_of(logs, number, who) for number in numbers) if path.exists()]
    parts = []
    for path in sorted(known, key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf8", errors="replace").strip().splitlines()
        starts = [number for number, line in enumerate(lines) if STARTED in line]
        lines = lines[starts[-1] :] if starts else lines  # a log continues through restarts
        stacks = [number for number, line in enumerate(lines) if line.startswith("Timeout (")]
        shown = lines[stacks[-1] :][: 3 * TAIL_LINES] if stacks else lines[-TAIL_LINES:]
        parts.append(f"{path.stem}, the end of {path}:\n" + "\n".join(f"  {line}" for line in shown))
    return "\n".join(parts)


REMEDIES = {
    "out of memory": "lower cluster.micro_batch, raise cluster.zero_stage, or set cluster.offload or "
    "activation_checkpointing; `cl-dist plan` estimates the memory of a worker",
    "low on memory": "the node's memory was full: use fewer workers per node, or cluster.zero_stage=3",
    "Timeout (": "the stacks show where it waited; if a step, loading or a shard can take that long, raise "
    "cluster.progress_timeout_s",
    "No space left on device": "free disk space, or set another run.dir",
    "NCCL": "check the network between the nodes; NCCL_DEBUG=INFO in their environment logs more",
}
"""Remedies by a word in an error or in a log."""


def remedy(words: str) -> str:
    """Return the remedy for the words of an error and of logs, as a separate line, or an empty string."""
    return next((f"What to change: {text}.\n" for word, text in REMEDIES.items() if word in words), "")
