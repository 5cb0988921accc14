"""Run summaries to one self-contained HTML page and a PNG of the accuracy matrix.

The page needs no network and no script, and forbids both to itself: task ids, labels, texts and commands come from
users. A section without numbers is left out; a number that was not measured is a dash, never 0.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_dist.errors import DataError
from cl_dist.intervals import wilson
from cl_dist.ledger import write_text
from cl_dist.metrics import DEFINITIONS
from launcher.report.answers import answer_views
from launcher.report.comparison import (
    accuracy_interval,
    at_widths,
    comparison,
    full_mean,
    mean_chart,
    num_learned,
    square,
    value,
)
from launcher.report.figures import (
    STEPS,
    Line,
    clean,
    curve,
    heat_class,
    heat_css,
    heat_step,
    ink,
    score_range,
    shade,
    shorten,
    spark,
)
from launcher.report.numbers import duration, number, span
from launcher.report.plugins import plugin_view
from launcher.report.rehearsal import warnings
from launcher.report.stored import Details
from launcher.report.verdict import verdict
from launcher.report.votes import vote_view

SCHEMA_VERSION = 1
MAX_LINES = 8
"""More tasks than this get a small chart each: nineteen lines or colours are too many to tell apart."""
KINDS = ("train", "generate", "rationalise", "record", "vote", "choose", "evaluate", "other")

Summary = Mapping[str, Any]
Row = Sequence[float | None]

WIDTHS = (640, 350)
"""Of the line charts, for a desk and for a phone."""
TILES = (
    ("cl/avg_acc", ""),
    ("cl/f1_macro", "mean over the tasks learned"),
    ("cl/bwt", "change of old tasks; below 0 is forgetting"),
    ("cl/fwt_one", "against a model per task"),
    ("cl/learning_acc", "accuracy right after learning a task"),
)
"""Metrics of the tiles with a remark; the last one stands in for one that was not measured."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map table."""

    text: str
    style: str = ""
    note: str = ""


def write_report(summaries: Sequence[Summary], out_dir: Path, details: Sequence[Details] | None = None) -> Path:
    """Write index.html and matrix.png on the first run, compared with the others; return the page's path.

    Args:
        summaries: Summaries of the runs.
        out_dir: Folder of the page.
        details: Details of the same runs. Without them the page has no settings, learning curves, answers or intervals.

    Raises:
        DataError: If there is no summary, or one has another schema version than this report reads.
    """
    if not summaries:
        raise DataError("no run to report on: expected at least one summary")
    for summary in summaries:
        if (version := summary.get("schema_version")) != SCHEMA_VERSION:
            raise DataError(
                f"run {summary.get('run')!r}: schema_version={version!r}: expected {SCHEMA_VERSION}; "
                "write it again with this version of cl-dist"
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    page = out_dir / "index.html"
    write_text(page, environment().get_template("report.html.j2").render(view(summaries, out_dir, details)))
    _write_png(summaries[0], out_dir / "matrix.png")
    return page


def environment() -> Environment:
    """Return the environment of the templates, which escapes every text."""
    env = Environment(loader=PackageLoader("launcher"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.lstrip_blocks = True
    env.filters |= {"number": number, "duration": duration, "clean": clean, "shorten": shorten, "span": span}
    return env


def view(summaries: Sequence[Summary], out_dir: Path, details: Sequence[Details] | None = None) -> dict[str, Any]:
    """Return what the template shows; a section without data is None or empty."""
    main, found = summaries[0], dict(enumerate(details or ()))
    accuracy, f1, own = square(main, "accuracy"), square(main, "f1_macro"), found.get(0)
    learned = num_learned(accuracy)
    sentence, on_intervals = verdict(main, summaries[1:], learned, found)
    return {
        "main": main,
        "css": heat_css(),
        "num_learned": learned,
        "verdict": sentence,
        "on_intervals": on_intervals,
        "tiles": _tiles(main, learned, own),
        "runs": comparison(summaries, found),
        "matrix": _matrix(main, accuracy, summaries) if learned else None,
        "f1": _matrix({**main, "references": {}}, f1, ()) if num_learned(f1) else None,
        "mean_chart": mean_chart(summaries, found, WIDTHS),
        "task_chart": _task_chart(main, accuracy, learned),
        "curves": _curves(main, own),
        "answers": [] if own is None else answer_views(own, main, learned),
        "plugins": plugin_view(main, accuracy) if main.get("plugins") else None,
        "replay": main.get("replay") or [],
        "untrusted": warnings(main.get("replay") or [], main["tasks"]),
        "votes": [vote_view(vote) for vote in main.get("votes") or []],
        "overlaps": [task for task in main["tasks"] if task.get("overlap")],
        "time": _time(main),
        "settings": _settings(own, out_dir),
        "metrics": [(name, DEFINITIONS.get(name), metric) for name, metric in main["metrics"].items()],
        "words": {name: definition.word for name, definition in DEFINITIONS.items()},
    }


def _settings(details: Details | None, out_dir: Path) -> dict[str, Any] | None:
    """Return the resolved run file, links to the run's files that exist, and the matrix as a data address."""
    if details is None:
        return None
    files = (details.folder / name for name in ("config.yaml", "metrics/R.csv", "metrics/summary.json"))
    links = [
        (path.name, quote(os.path.relpath(path.resolve(), out_dir.resolve()).replace(os.sep, "/")))
        for path in files
        if path.is_file()
    ]
    data = base64.b64encode(details.matrix_csv.encode()).decode()
    return {"text": clean_lines(details.settings), "links": links, "csv": data and f"data:text/csv;base64,{data}"}


def clean_lines(text: str) -> str:
    """Return a text of several lines without control and text-direction characters."""
    return "\n".join(clean(line) for line in text.splitlines())


def _curves(main: Summary, details: Details | None) -> dict[str, Any] | None:
    """Return a panel per task with its loss and dev accuracy, all on the same axes; None if nothing was logged."""
    found = [] if details is None else list(zip(main["tasks"], details.curves, strict=False))
    if not any(len(one.losses) > 1 or len(one.dev) > 1 for _, one in found):
        return None
    highest = max((loss for _, one in found for _, loss in one.losses), default=0.0)
    scores = [score for _, one in found for _, score in one.dev]
    bounds = score_range(scores) if scores else None
    panels = [
        (j, clean(task["id"]), curve(one.losses, one.dev, highest, bounds))
        for j, (task, one) in enumerate(found, 1)
        if one.losses or one.dev
    ]
    return {"panels": panels, "has_dev": bool(scores)}


def _tiles(main: Summary, learned: int, details: Details | None) -> list[tuple[str, str, str, str]]:
    """Return (heading, number, remark, interval) of the four results that a reader looks for first."""
    shown = [name for name, _ in TILES if value(main, name) is not None or name in ("cl/avg_acc", "cl/bwt")][:4]
    majority = full_mean([task.get("majority") for task in main["tasks"][:learned]])
    chance = "" if majority is None else f"always the commonest label: {number(majority)}"
    remarks = dict(TILES) | {"cl/avg_acc": chance}
    tiles = []
    for name in shown:
        interval = main["metrics"].get(name, {}).get("interval")
        if name == "cl/avg_acc":
            interval = accuracy_interval(main, details)
        is_signed = DEFINITIONS[name].is_difference
        bounds = "" if interval is None else f"95 % interval {span((interval[0], interval[1]), sign=is_signed)}"
        text = number(value(main, name), sign=DEFINITIONS[name].is_difference)
        heading = DEFINITIONS[name].word
        tiles.append((heading[0].upper() + heading[1:], text, remarks[name], bounds))
    return tiles


def _matrix(main: Summary, rows: Sequence[Row], summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the heat map of scores, the references below it, and each task's change since it was learned."""
    tasks, T = main["tasks"], len(main["tasks"])
    digits = 3 if T <= MAX_LINES else 2
    majority = [task.get("majority") for task in tasks]
    extra: dict[str, Row] = {"commonest label": majority} if summaries else {}
    for role, label in (("individual", "own model"), ("joint", "joint training")):
        name = (main.get("references") or {}).get(role)
        own = next((s for s in summaries if s["run"] == name), None)  # the main run's baselines come first
        extra |= {} if own is None else {label: _reference(own, role, tasks)}
    known = [x for row in [*rows, *extra.values()] for x in row if x is not None]
    low, high = score_range(known)

    def cell(score: float | None, note: str, style: str = "", more: str = "") -> Cell:
        if score is None:
            return Cell("", "void", f"{note}: not measured")
        text = f"{note}: {number(score, 4)}{more}"
        return Cell(number(score, digits), f"{style} {heat_class(score, low, high)}", text)

    def interval(score: float | None, t: int, j: int) -> str:
        task, count = tasks[j], tasks[j]["rows"].get("test")
        stored = ((main.get("intervals") or {}).get("accuracy") or [])[t : t + 1]
        bounds = stored[0][j] if stored and j < len(stored[0]) else None
        if score is None or not count or not summaries:
            return ""
        if bounds is None and task["labels"]:
            bounds = wilson(round(score * count), count)
        return "" if bounds is None else f" (95 % interval {span(bounds)}, {count} rows)"

    body = []
    for t, row in enumerate(rows):
        cells = []
        for j, score in enumerate(row):
            if score is None and j > t:
                cells.append(Cell("", "later", f"{clean(tasks[j]['id'])} is not learned yet"))
                continue
            note = f"after {clean(tasks[t]['id'])}, on {clean(tasks[j]['id'])}"
            cells.append(cell(score, note, "learned" if j == t else "", interval(score, t, j)))
        mean = cell(full_mean(row[: t + 1]), "mean of the tasks learned so far")
        body.append((t + 1, clean(tasks[t]["id"]), cells, mean))
    below = []
    for label, values in extra.items():
        cells = [cell(x, f"{label}, {clean(task['id'])}") for x, task in zip(values, tasks, strict=True)]
        mean = cell(full_mean(values), f"{label}, mean")
        below.append((label, cells, mean))
    last = max(num_learned(rows) - 1, 0)
    change = [_change(rows, j, last, digits) for j in range(T)] if last else []
    return {"rows": body, "below": below, "change": change, "low": low, "high": high, "wide": T <= MAX_LINES}


def _change(rows: Sequence[Row], j: int, last: int, digits: int) -> Cell:
    now, then = rows[last][j], rows[j][j]
    if j >= last:
        return Cell("", "later", "just learned, or not learned yet")
    if now is None or then is None:
        return Cell("", "void", "not measured")
    change = round(now - then, digits)
    style = "loss" if change < 0 else "gain" if change > 0 else ""
    return Cell(number(change, digits, sign=True), style, f"{number(then, 4)} when learned, {number(now, 4)} now")


def _reference(summary: Summary, role: str, tasks: Sequence[Summary]) -> Row:
    """Return a reference run's score per task: the diagonal where each has its own model, else the last row."""
    rows, place = square(summary, "accuracy"), {task["id"]: k for k, task in enumerate(summary["tasks"])}
    where = [place.get(task["id"]) for task in tasks]
    return [None if k is None else rows[k][k] if role == "individual" else rows[-1][k] for k in where]


def _task_chart(main: Summary, rows: Sequence[Row], learned: int) -> dict[str, Any] | None:
    """Return one chart with a line per task, or, for many tasks, one small chart each."""
    tasks = main["tasks"][:learned]
    series = [[(t + 1, score) for t in range(j, learned) if (score := rows[t][j]) is not None] for j in range(learned)]
    if not any(len(points) > 1 for points in series):
        return None
    named = [(j, task, points) for j, (task, points) in enumerate(zip(tasks, series, strict=True)) if points]
    if len(main["tasks"]) <= MAX_LINES:
        lines = [Line(f"{j + 1} {clean(task['id'])}", points, j) for j, task, points in named]
        return {"chart": at_widths(lines, "accuracy of each task over the sequence", WIDTHS), "panels": []}
    bounds = score_range([score for points in series for _, score in points])
    panels = [
        (
            j + 1,
            clean(task["id"]),
            points[0][1],
            points[-1][1],
            len(points),
            spark(points, learned, bounds, task.get("majority")),
        )
        for j, task, points in named
    ]
    return {"chart": None, "panels": panels, "low": bounds[0], "high": bounds[1]}


def _time(main: Summary) -> dict[str, Any] | None:
    """Return a stacked bar per task, with the seconds of its stages."""
    stages = [stage for stage in main.get("stages") or [] if stage.get("seconds") is not None]
    if not stages:
        return None
    per_task: dict[int, list[Summary]] = {}
    per_kind = dict.fromkeys(KINDS, 0.0)
    for stage in stages:
        per_task.setdefault(stage["task"], []).append(stage)
        per_kind[_kind(stage)] += stage["seconds"]
    totals = {t: sum(stage["seconds"] for stage in group) for t, group in per_task.items()}
    longest = max(totals.values()) or 1.0

    def segment(stage: Summary) -> tuple[float, str, str]:
        note = f"{clean(stage['key'])}: {duration(stage['seconds'])}"
        return 100 * stage["seconds"] / longest, f"k-{_kind(stage)}", note

    bars = [
        (t + 1, clean(main["tasks"][t]["id"]), [segment(stage) for stage in group], duration(totals[t]))
        for t, group in sorted(per_task.items())
    ]
    shares = [(kind, seconds) for kind, seconds in per_kind.items() if seconds]
    return {"bars": bars, "shares": shares, "total": duration(sum(totals.values())), "stages": stages}


def _kind(stage: Summary) -> str:
    return stage["kind"] if stage["kind"] in KINDS else "other"


def _write_png(main: Summary, path: Path) -> None:
    """Draw the accuracy matrix for slides and papers; the page does not need it."""
    from matplotlib.colors import ListedColormap  # here: it costs the command line half a second
    from matplotlib.figure import Figure

    rows, ids = square(main, "accuracy"), [shorten(task["id"], 28) for task in main["tasks"]]
    T, known = len(ids), [x for row in rows for x in row if x is not None]
    low, high = score_range(known) if known else (0.0, 1.0)
    figure = Figure(figsize=(min(3.2 + 0.62 * T, 24), min(2.6 + 0.42 * T, 20)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours = ListedColormap([shade("blue", k) for k in range(STEPS)]).with_extremes(bad="#e4e6ea")
    values = [[float("nan") if x is None else x for x in row] for row in rows]
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for t, row in enumerate(rows):
        for j, x in enumerate(row):
            if x is not None:
                colour = ink(shade("blue", heat_step(x, low, high)))
                axes.text(j, t, f"{x:.2f}", ha="center", va="center", size=8, color=colour)
    axes.set_xticks(range(T), ids, rotation=40, ha="right", rotation_mode="anchor", parse_math=False, size=8)
    axes.set_yticks(range(T), ids, parse_math=False, size=8)
    axes.set_xlabel("on task (grey: not measured)")
    axes.set_ylabel("after task")
    axes.set_title(f"Accuracy, {shorten(main['run'], 40)}", parse_math=False, size=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.savefig(path)
