"""Log lines: their format, the driver's log file, and the line of a run's event."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_dist.errors import printable

LINE = "%(asctime)s %(levelname)-5s %(name)s  %(message)s"
_NOT_SHOWN = {"ts", "event", "stage", "task", "kind", "metrics", "tasks", "fingerprint"}
_NOT_LOGGED = ("step", "phase", "plan")
_events = logging.getLogger("cl_dist.run")


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return printable(super().format(record))


@contextmanager
def driver_log(folder: Path) -> Iterator[None]:
    """Also write the log, from INFO on, to logs/driver.log of a run folder."""
    path = folder / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf8", errors="backslashreplace")
    handler.setFormatter(PrintableFormatter(LINE))
    logger = logging.getLogger("cl_dist")
    level = logger.level
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def event_line(event: Mapping[str, Any]) -> str:
    """Return an event as one line: its name, its stage, then key=value words."""
    words = [f"{key}={_short(value)}" for key, value in event.items() if key not in _NOT_SHOWN]
    return " ".join([event["event"], *([f"stage={event['stage']}"] if "stage" in event else []), *words])


def log_event(event: Mapping[str, Any]) -> None:
    """Log an event, unless it is for a progress bar alone."""
    if event["event"] not in _NOT_LOGGED:
        _events.log(logging.WARNING if "warning" in event else logging.INFO, event_line(event))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_short(item)}" for key, item in value.items())
    return str(value)
