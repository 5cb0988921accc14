"""Signs of life of ranks and actors: in their logs while they live, read from there when they are gone."""

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
"""What train.run logs when a stage begins or goes on."""


class Watchdog:
    """Ends the process, its stacks in a log, when no sign of life comes for too long; notes one a second in the log.

    A context: watched from its beginning, so that loading counts, to its end. A rank that hangs in a collective hangs
    with all others: each ends itself, and the gang starts again.
    """

    def __init__(self, timeout_s: float, file: Any) -> None:
        """Take the seconds between two signs of life (0: any), and the open log file."""
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
        """Note that so many steps are done."""
        if time.monotonic() - self._noted > HEARTBEAT_S:
            self._noted = time.monotonic()
            self._watch()  # each watch is a thread of its own: too dear for every step
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            log.info("alive step=%d peak_memory_gb=%.2f", step, peak_gb)


def log_of(logs: Path, number: int, who: str = "rank") -> Path:
    """Return where a rank of the gang, or an actor of the pool, has its log."""
    return logs / f"{who}-{number}.log"


def log_tails(logs: Path, numbers: Iterable[int], who: str = "rank") -> str:
    """Return the ends of some ranks' logs, that of the rank first which fell silent first; stacks where it hung."""
    known = [path for path in (log_of(logs, number, who) for number in numbers) if path.exists()]
    parts = []
    for path in sorted(known, key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf8", errors="replace").strip().splitlines()
        starts = [number for number, line in enumerate(lines) if STARTED in line]
        lines = lines[starts[-1] :] if starts else lines  # a log goes on through restarts
        stacks = [number for number, line in enumerate(lines) if line.startswith("Timeout (")]
        shown = lines[stacks[-1] :][: 3 * TAIL_LINES] if stacks else lines[-TAIL_LINES:]
        parts.append(f"{path.stem}, the end of {path}:\n" + "\n".join(f"  {line}" for line in shown))
    return "\n".join(parts)


REMEDIES = {
    "out of memory": "`cl-dist plan` tells what a worker needs: lower cluster.micro_batch, raise cluster.zero_stage, "
    "or set cluster.offload or activation_checkpointing",
    "low on memory": "the node's memory was full: fewer workers on a node, or cluster.zero_stage=3",
    "Timeout (": "the stacks show where it waited; where a step, loading or a shard may take so long, raise "
    "cluster.progress_timeout_s",
    "No space left on device": "make room, or name another run.dir",
    "NCCL": "look at the network between the nodes; NCCL_DEBUG=INFO in their environment tells more",
}
"""What to change, by a word in an error or in a log."""


def remedy(words: str) -> str:
    """Return what the words of an error and of logs say should be changed, as a line of its own; else nothing."""
    return next((f"What to change: {text}.\n" for word, text in REMEDIES.items() if word in words), "")
