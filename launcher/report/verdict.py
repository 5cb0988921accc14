"""The sentence on top of a page: what a run forgets, and how it compares with its floor and its ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_dist.intervals import mean_interval
from launcher.report.comparison import num_learned, square, value
from launcher.report.numbers import number
from launcher.report.numbers import span as span_text
from launcher.report.stored import Details

Summary = Mapping[str, Any]
Scores = Sequence[NDArray[np.float64]]
RIVALS = (("sequential", "sequential"), ("individual", "one model per task"), ("joint", "joint training"))
"""Methods that every other is compared with, and their names in the sentence."""


def verdict(main: Summary, others: Sequence[Summary], learned: int, details: Mapping[int, Details]) -> tuple[str, str]:
    """Return the sentence, and a note on its intervals; both are empty before the first task is learned.

    Args:
        main: Summary of the run.
        others: Summaries of the runs that it is compared with.
        learned: Number of tasks learned.
        details: Details of the runs, by position: 0 is the main run.
    """
    accuracy = value(main, "cl/avg_acc")
    if accuracy is None:
        return "", ""
    parts, own = [], _last(main, details.get(0), learned)
    if learned > 1:
        parts.append(_forgetting(main, details.get(0), learned))
    for method, name in RIVALS:
        place = next((k for k, s in enumerate(others) if s["method"] == method and main["method"] != method), None)
        if place is None or not _is_alike(main, others[place], learned):
            continue
        rival = others[place]
        theirs = _last(rival, details.get(place + 1), learned)
        if (score := value(rival, "cl/avg_acc")) is not None:
            parts.append(_compared(accuracy - score, name, _difference(own, theirs, accuracy - score)))
    if not any(other["method"] in dict(RIVALS) for other in others):
        majority = [task.get("majority") for task in main["tasks"][:learned]]
        if majority and None not in majority:
            gap = accuracy - sum(majority) / len(majority)
            parts.append(f"{number(gap, sign=True)} over always answering the commonest label")
    sentence = "; ".join(part for part in parts if part)
    sentence = f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""
    return sentence, (
        "In brackets: 95 % intervals over the choice of test rows; another seed or order of tasks may differ by more."
        if "(" in sentence
        else ""
    )


def _is_alike(main: Summary, rival: Summary, learned: int) -> bool:
    """Return whether a rival has learned the same tasks in the same order."""
    ids = [[task["id"] for task in summary["tasks"]] for summary in (main, rival)]
    return ids[0] == ids[1] and num_learned(square(rival, "accuracy")) == learned


def _forgetting(main: Summary, details: Details | None, T: int) -> str:
    """Return what happened to old tasks since they were learned."""
    forgotten, change = value(main, "cl/forgetting_max"), value(main, "cl/bwt")
    if forgotten is None or change is None:
        return ""
    if forgotten == 0 and change == 0:
        return "forgets nothing"
    then = _complete([_right(main, details, j, j) for j in range(T - 1)])
    now = _complete([_right(main, details, T - 1, j) for j in range(T - 1)])
    span = _difference(then, now, -change)
    if change == 0 or (span is not None and span[0] <= 0 <= span[1]):
        return f"no forgetting seen: {number(-change, sign=True)}{_span(span, 1, sign=True)}"
    if change < 0:
        return f"forgets {number(-change)}{_span(span, 1)}"
    return f"old tasks gain {number(change)}{_span(span, -1)} after they are learned"


def _compared(gap: float, name: str, span: tuple[float, float] | None) -> str:
    if span is not None and span[0] <= 0 <= span[1]:
        return f"no difference seen from {name}: {number(gap, sign=True)}{_span(span, 1, sign=True)}"
    if round(gap, 3) == 0:
        return f"level with {name}"
    if name == "sequential" and gap > 0:
        return f"{number(gap, sign=True)} over {name}{_span(span, 1, sign=True)}"
    return f"{number(abs(gap))} {'above' if gap > 0 else 'below'} {name}{_span(span, 1 if gap > 0 else -1)}"


def _span(span: tuple[float, float] | None, factor: int, *, sign: bool = False) -> str:
    if span is None:
        return ""
    low, high = sorted(factor * end for end in span)
    return f" ({span_text((low, high), sign=sign)})"


def _right(summary: Summary, details: Details | None, t: int, j: int) -> NDArray[np.float64] | None:
    """Return 1 per right row of task j after task t; None if answers are missing, or the score is not their mean."""
    right = None if details is None else details.right(t, j)
    score = summary["matrix"]["accuracy"][t][j]
    return right if right is not None and score is not None and abs(right.mean() - score) < 1e-9 else None


def _last(summary: Summary, details: Details | None, T: int) -> Scores | None:
    rows = summary["matrix"]["accuracy"]
    return _complete([_right(summary, details, T - 1, j) for j in range(T)]) if len(rows) >= T else None


def _complete(values: Sequence[NDArray[np.float64] | None]) -> Scores | None:
    known = [x for x in values if x is not None]
    return known if known and len(known) == len(values) else None


def _difference(one: Scores | None, other: Scores | None, gap: float) -> tuple[float, float] | None:
    """Return the interval of a difference of mean scores, paired by row; None if rows are unknown or differ."""
    if one is None or other is None or [a.size for a in one] != [b.size for b in other]:
        return None
    pairs = [a - b for a, b in zip(one, other, strict=True)]
    if abs(float(np.mean([pair.mean() for pair in pairs])) - gap) > 1e-6:
        return None
    return mean_interval(pairs, is_difference=True)
