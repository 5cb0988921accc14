"""Signs of life of a gang's ranks: in their logs while they live, read from there when they are gone."""

import faulthandler
import logging
import resource
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
EVERY_S = 1.0
SHOWN = 6
STARTED = "train start"
"""What train.run logs when a stage begins or goes on."""


class Alive:
    """Notes a step a second in a rank's log, and ends the process, its stacks in the log, when none comes for too long.

    A rank that hangs in a collective hangs with all others: each ends itself, and the gang starts again.
    """

    def __init__(self, timeout_s: float, file: Any) -> None:
        """Take the seconds that a step may take (0: any), and the open log file."""
        self._timeout_s, self._file, self._noted = timeout_s, file, 0.0

    def __call__(self, step: int | None) -> None:
        """Note that a step is done; None ends the watch."""
        if step is None:
            faulthandler.cancel_dump_traceback_later()
            return
        if time.monotonic() - self._noted > EVERY_S:
            self._noted = time.monotonic()
            if self._timeout_s:  # each watch is a thread of its own: too dear for every step
                faulthandler.dump_traceback_later(self._timeout_s + EVERY_S, exit=True, file=self._file)
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            log.info("alive step=%d peak_memory_gb=%.2f", step, peak_gb)


def last_words(logs: Path, workers: int) -> str:
    """Return the ends of all ranks' logs, that of the rank first which fell silent first; stacks where it hung."""
    known = [path for path in (logs / f"rank-{rank}.log" for rank in range(workers)) if path.exists()]
    parts = []
    for path in sorted(known, key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf8", errors="replace").strip().splitlines()
        starts = [number for number, line in enumerate(lines) if STARTED in line]
        lines = lines[starts[-1] :] if starts else lines  # a log goes on through restarts
        stacks = [number for number, line in enumerate(lines) if line.startswith("Timeout (")]
        shown = lines[stacks[-1] :][: 3 * SHOWN] if stacks else lines[-SHOWN:]
        parts.append(f"{path.stem}, the end of {path}:\n" + "\n".join(f"  {line}" for line in shown))
    return "\n".join(parts)
