"""The table and the chart of compared runs; runs that differ by seed or order of tasks alone form a group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup

from cl_dist.intervals import Interval, half_width, mean_interval
from cl_dist.metrics import DEFINITIONS
from launcher.report.figures import Line, clean, line_chart
from launcher.report.numbers import DASH, duration, number, span
from launcher.report.stored import Details

Summary = Mapping[str, Any]
Row = Sequence[float | None]
COLUMNS = (
    "cl/avg_acc",
    "cl/f1_macro",
    "cl/learning_acc",
    "cl/bwt",
    "cl/forgetting_max",
    "cl/fwt_one",
    "cl/intransigence",
)
ROLES = {"sequential": "floor", "individual": "ceiling", "joint": "ceiling"}
"""Methods that bound the others: they take no part in the comparison for the best."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the table."""

    text: str
    spread: str = ""
    """Half of its interval, or the standard deviation over a group."""
    note: str = ""
    is_best: bool = False


def square(summary: Summary, name: str) -> list[Row]:
    """Return a matrix with a row and a column per task, None where nothing was measured."""
    T = len(summary["tasks"])
    rows: list[Row] = [[*row, *[None] * T][:T] for row in summary["matrix"].get(name) or []]
    return [*rows, *[[None] * T for _ in range(T)]][:T]


def num_learned(rows: Sequence[Row]) -> int:
    """Return the number of tasks up to the last one with a score."""
    return max((t + 1 for t, row in enumerate(rows) if any(x is not None for x in row)), default=0)


def value(summary: Summary, name: str) -> float | None:
    """Return a metric, or None if it was not measured."""
    found: float | None = summary["metrics"].get(name, {}).get("value")
    return found


def full_mean(values: Row) -> float | None:
    """Return the mean, or None if a value is missing."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def accuracy_interval(summary: Summary, details: Details | None) -> Interval | None:
    """Return the interval of cl/avg_acc over the choice of test rows; None if answers are not stored."""
    if (stored := summary["metrics"].get("cl/avg_acc", {}).get("interval")) is not None:
        return float(stored[0]), float(stored[1])
    rows = square(summary, "accuracy")
    T = num_learned(rows)
    if details is None or not T:
        return None
    right = [details.right(T - 1, j) for j in range(T)]
    known = [x for x, score in zip(right, rows[T - 1], strict=False) if x is not None and x.mean() == score]
    return mean_interval(known) if len(known) == T else None


def names(summaries: Sequence[Summary], details: Mapping[int, Details]) -> list[str]:
    """Return a name per run: its own, or its path from the runs' folder where several have the same."""
    plain = [str(summary["run"]) for summary in summaries]
    found = []
    for k, name in enumerate(plain):
        if plain.count(name) > 1 and k in details:
            folder = details[k].folder
            name = f"{folder.parent.parent.name}/{name}" if folder.parent.name == "baselines" else str(folder)
        found.append(clean(name))
    return found


def groups(summaries: Sequence[Summary], details: Mapping[int, Details]) -> list[list[int]]:
    """Return the positions of runs in groups that differ by seed or order of tasks alone."""
    found: dict[Any, list[int]] = {}
    for k, summary in enumerate(summaries):
        learned = num_learned(square(summary, "accuracy"))
        key = (details[k].group, learned) if k in details else k
        found.setdefault(key, []).append(k)
    return list(found.values())


def comparison(summaries: Sequence[Summary], details: Mapping[int, Details]) -> dict[str, Any]:
    """Return the table: the columns that any run can fill, a row per run, and one per group with mean and sd."""
    columns = [name for name in COLUMNS if any(value(s, name) is not None for s in summaries)]
    labels, members = names(summaries, details), groups(summaries, details)
    orders = [tuple(task["id"] for task in s["tasks"]) for s in summaries]
    learned = [num_learned(square(s, "accuracy")) for s in summaries]
    alike = len({(frozenset((orders[k], learned[k]) for k in unit)) for unit in members}) == 1
    best = _best(summaries, members, columns) if alike else {}
    rows = []
    for unit in members:
        if len(unit) > 1:
            rows.append(_group_row([summaries[k] for k in unit], columns, best, is_main=0 in unit))
        for k in unit:
            marks = best if len(unit) == 1 else {}
            row = _run_row(summaries[k], details.get(k), columns, marks, labels[k])
            rows.append(row | {"is_main": k == 0, "is_member": len(unit) > 1})
    return {
        "columns": [(name, DEFINITIONS[name]) for name in columns],
        "rows": rows,
        "num": len(summaries),
        "alike": alike,
        "ranked": bool(best),
        "grouped": any(len(unit) > 1 for unit in members),
        "alone": [labels[k] for k, s in enumerate(summaries) if s["method"] == "individual"],
        "roles": sorted({ROLES[s["method"]] for s in summaries if s["method"] in ROLES}, reverse=True),
    }


def _best(summaries: Sequence[Summary], units: Sequence[Sequence[int]], columns: Sequence[str]) -> dict[str, float]:
    """Return the best mean of each column among the units that are neither floor nor ceiling, if there are several."""
    found = {}
    for name in columns:
        means = [_mean([value(summaries[k], name) for k in unit]) for unit in units if _competes(summaries[unit[0]])]
        known = [x for x in means if x is not None]
        if len(known) > 1:
            found[name] = max(known) if DEFINITIONS[name].more_is_better else min(known)
    return found


def _competes(summary: Summary) -> bool:
    return summary["method"] not in ROLES


def _mean(values: Row) -> float | None:
    known = [x for x in values if x is not None]
    return mean(known) if known and len(known) == len(values) else None


def _seconds(summary: Summary) -> float | None:
    seconds = [stage["seconds"] for stage in summary.get("stages") or []]
    return sum(seconds) if seconds else None


def _run_row(
    summary: Summary, details: Details | None, columns: Sequence[str], best: Mapping[str, float], label: str
) -> dict[str, Any]:
    cells = []
    for name in columns:
        own, note, spread = value(summary, name), "", ""
        interval = summary["metrics"].get(name, {}).get("interval")
        if name == "cl/avg_acc":
            interval = accuracy_interval(summary, details)
        if interval is not None and own is not None:
            sign = DEFINITIONS[name].is_difference
            note = f"95 % interval over test rows: {span((interval[0], interval[1]), sign=sign)}"
            spread = f"±{half_width((interval[0], interval[1])):.3f}" if name == "cl/avg_acc" else ""
        is_best = _competes(summary) and own is not None and own == best.get(name)
        cells.append(Number(number(own, sign=DEFINITIONS[name].is_difference), spread, note, is_best))
    return {
        "label": label,
        "status": summary["status"],
        "method": clean(summary["method"]),
        "role": ROLES.get(summary["method"], ""),
        "seed": summary["seed"],
        "learned": num_learned(square(summary, "accuracy")),
        "cells": cells,
        "seconds": duration(_seconds(summary)),
        "is_group": False,
    }


def _group_row(
    summaries: Sequence[Summary], columns: Sequence[str], best: Mapping[str, float], *, is_main: bool
) -> dict[str, Any]:
    first, cells = summaries[0], []
    for name in columns:
        values = [value(s, name) for s in summaries]
        known = [x for x in values if x is not None]
        middle = _mean(values)
        spread = f"±{stdev(known):.3f}" if middle is not None else ""
        note = f"mean and standard deviation of {', '.join(number(x, 4) for x in known)}"
        is_best = _competes(first) and middle is not None and middle == best.get(name)
        cells.append(Number(number(middle, sign=DEFINITIONS[name].is_difference), spread, note, is_best))
    seconds = [x for s in summaries if (x := _seconds(s)) is not None]
    return {
        "label": group_label(summaries),
        "status": "finished",
        "method": clean(first["method"]),
        "role": ROLES.get(first["method"], ""),
        "seed": ", ".join(str(s["seed"]) for s in summaries),
        "learned": num_learned(square(first, "accuracy")),
        "cells": cells,
        "numbers": dict(zip(columns, cells, strict=True)),
        "seconds": duration(mean(seconds)) if seconds else DASH,
        "is_group": True,
        "is_main": is_main,
        "is_member": False,
    }


def group_label(summaries: Sequence[Summary]) -> str:
    """Return the name of a group."""
    orders = {tuple(task["id"] for task in s["tasks"]) for s in summaries}
    seeds = {s["seed"] for s in summaries}
    kinds = [f"{len(seeds)} seeds"] * (len(seeds) > 1) + [f"{len(orders)} orders"] * (len(orders) > 1)
    return f"{clean(summaries[0]['method'])}, {' and '.join(kinds) or f'{len(summaries)} runs'}"


def mean_chart(summaries: Sequence[Summary], details: Mapping[int, Details], widths: Sequence[int]) -> Markup | None:
    """Return the mean accuracy over the sequence: a line per run, and per group one with a band of ± one sd."""
    labels, lines = names(summaries, details), []
    for shade, unit in enumerate(groups(summaries, details)):
        series = [means(summaries[k]) for k in unit]
        shared = sorted(set.intersection(*(set(points) for points in series)))
        if not shared:
            continue
        is_main, is_group = 0 in unit, len(unit) > 1
        values = [[points[t] for points in series] for t in shared]
        points = [(t, mean(found)) for t, found in zip(shared, values, strict=True)]
        spreads = [stdev(found) if is_group else 0.0 for found in values]
        name = group_label([summaries[k] for k in unit]) if is_group else labels[unit[0]]
        band = [(y - sd, y + sd) for (_, y), sd in zip(points, spreads, strict=True)] if is_group else []
        notes = [f"±{sd:.4f}" for sd in spreads] if is_group else []
        lines.append(Line(name, points, shade, is_dashed=not is_main, is_main=is_main, notes=notes, band=band))
    return at_widths(lines, "mean accuracy over the tasks learned so far", widths)


def at_widths(lines: Sequence[Line], title: str, widths: Sequence[int]) -> Markup | None:
    """Return a chart drawn for a desk and for a phone (CSS shows one), or None if there is no line to draw."""
    if not any(len(line.points) > 1 for line in lines):
        return None
    wide, narrow = (line_chart(lines, width, title) for width in widths)
    return Markup('<div class="desk">{}</div><div class="phone">{}</div>').format(wide, narrow)


def means(summary: Summary) -> dict[int, float]:
    """Return {tasks learned: mean accuracy over them} where every score that it needs was measured."""
    rows = square(summary, "accuracy")
    alone = summary["method"] == "individual"  # its models never see another task: task j keeps the score a[j,j]
    found = {}
    for t, row in enumerate(rows):
        seen = [rows[j][j] if alone else row[j] for j in range(t + 1)]
        if (average := full_mean(seen)) is not None:
            found[t + 1] = average
    return found
