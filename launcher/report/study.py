"""Page of a study: the document study.json to one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cl_dist.ledger import write_text
from cl_dist.study.file import METRICS
from cl_dist.study.results import LOWER_IS_BETTER, NAMES, points
from launcher.report.figures import clean, shorten, svg, tag
from launcher.report.page import environment

Document = Mapping[str, Any]


def write_page(document: Document, folder: Path) -> Path:
    """Write report/index.html of a study folder, and return its path."""
    env = environment()
    env.filters |= {"points": _points, "p": p_value}
    page = folder / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, env.get_template("study.html.j2").render(view(document)))
    return page


def view(document: Document) -> dict[str, Any]:
    """Return what the template shows."""
    shown = [name for name in METRICS if any(arm["metrics"].get(name) for arm in document["arms"])]
    comparisons = document["comparisons"]
    measured = [line for line in comparisons if line["pairs"]]
    charts = [
        (metric, forest([line for line in measured if line["metric"] == metric]))
        for metric in METRICS
        if any(line["metric"] == metric for line in measured)
    ]
    return {
        "study": document,
        "primary": comparisons[0],
        "metrics": [(name, NAMES[name]) for name in shown],
        "names": NAMES,
        "lower_is_better": LOWER_IS_BETTER,
        "charts": charts,
        "pairs_chart": pair_chart(comparisons[0]) if comparisons[0]["pairs"] else None,
        "tasks_chart": task_chart(comparisons[0]) if comparisons[0]["pairs"] else None,
        "measured": measured,
        "num_rows": sum(document["rows"].values()),
    }


def _points(value: float | None, sign: bool = True) -> str:
    """Return a fraction as points with a true minus sign, or a dash."""
    return "\N{EN DASH}" if value is None else points(value, sign=sign).replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """Return a p-value."""
    return "\N{EN DASH}" if value is None else "< .0001" if value < 0.0001 else f"{value:.4f}".removeprefix("0")


def forest(lines: Sequence[Document]) -> Markup:
    """Return the paired differences of one metric: a square with its interval per comparison, and the margin shaded."""
    rows = [(f"{line['name']}{' (primary)' if line['primary'] else ''}", line, line["verdict"]) for line in lines]
    return _intervals(rows, lines[0]["margin"], "paired differences with 95 % intervals, in points")


def pair_chart(line: Document) -> Markup:
    """Return the difference of each pair of a comparison, with the interval of its rows, and their mean."""
    rows = [(each["pair"], each, "pair") for each in line["by_pair"]]
    rows.append(("mean", line, line["verdict"]))
    return _intervals(rows, line["margin"], "difference of each pair of runs, in points")


def task_chart(line: Document) -> Markup:
    """Return the difference on each task of a comparison, and their mean."""
    alone = {"low": None, "high": None}
    rows: list[tuple[str, Document, str]] = [
        (each["task"], {**each, **alone}, "pair") for each in line["by_task"] if each["value"] is not None
    ]
    rows.append(("mean", line, line["verdict"]))
    return _intervals(rows, line["margin"], "difference on each task, in points")


def _intervals(rows: Sequence[tuple[str, Document, str]], margin: float, title: str) -> Markup:
    """Return a chart of intervals on one axis, in points."""
    ends = [abs(line[name]) for _, line, _ in rows for name in ("value", "low", "high") if line[name] is not None]
    reach = max([*ends, margin]) * 1.08
    label = 20 + 7.8 * max(len(shorten(name, 34)) for name, _, _ in rows)
    width, row, top = label + 560.0, 28, 12
    left, right, bottom = label, width - 110, top + row * len(rows)

    def at(value: float) -> float:
        return left + (value + reach) / (2 * reach) * (right - left)

    body = [tag("rect", class_="margin", x=at(-margin), y=top, width=at(margin) - at(-margin), height=bottom - top)]
    for tick in _ticks(reach):
        body.append(tag("line", class_="grid", x1=at(tick), x2=at(tick), y1=top, y2=bottom))
        text = points(tick).rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}") if tick else "0"
        body.append(tag("text", text, class_="tick", x=at(tick), y=bottom + 17, text_anchor="middle"))
    body.append(tag("line", class_="zero", x1=at(0), x2=at(0), y1=top, y2=bottom))
    for k, (name, line, kind) in enumerate(rows):
        y = top + (k + 0.5) * row
        note = f"{clean(name)}: {points(line['value'])}"
        parts = []
        if line["low"] is not None:
            note += f" ({points(line['low'])} to {points(line['high'])})"
            parts.append(tag("line", class_="whisker", x1=at(line["low"]), x2=at(line["high"]), y1=y, y2=y))
        parts.append(tag("rect", class_="point", x=at(line["value"]) - 5, y=y - 5, width=10, height=10))
        parts.append(tag("text", shorten(name, 34), class_="name", x=left - 12, y=y + 4, text_anchor="end"))
        number_text = points(line["value"]).replace("-", "\N{MINUS SIGN}")
        parts.append(tag("text", number_text, class_="tick", x=right + 12, y=y + 4))
        body.append(tag("g", tag("title", note), *parts, class_=f"v-{kind}"))
    return svg(width, bottom + 28, title, *body)


def _ticks(reach: float) -> list[float]:
    """Return round numbers from -reach to reach."""
    size = 10 ** math.floor(math.log10(reach))
    step = next(each for each in (size / 5, size / 2, size, size * 2, size * 5) if reach / each < 4.5)
    count = int(reach / step)
    return [k * step for k in range(-count, count + 1)]
