"""Scores with their intervals, as text for tables."""

from collections.abc import Sequence

from cl_dist.intervals import half_width

WIDE = 100
"""Terminals of fewer columns get scores without intervals, and tables with short headings."""


def score_text(value: float | None, interval: Sequence[float] | None = None, width: int = WIDE) -> str:
    """Return a score for a cell: "0.8625 ±.0213" with half of the length of its 95 % interval, "-" for None.

    Args:
        value: The score.
        interval: Its limits; None leaves them out.
        width: Columns of the terminal.
    """
    if value is None:
        return "-"
    if interval is None or width < WIDE:
        return f"{value:.4f}"
    low, high = interval
    return f"{value:.4f} ±{f'{half_width((low, high)):.4f}'.removeprefix('0')}"
