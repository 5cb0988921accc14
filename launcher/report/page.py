"""Run summaries to one self-contained HTML page and a PNG of the accuracy matrix.

The page needs no network and no script, and forbids both to itself: task ids, labels and commands come from
users. A section whose numbers are not in the summary is left out; a number not measured is a dash, never 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cl_dist.errors import DataError
from cl_dist.ledger import write_text
from launcher.report.figures import (
    STEPS,
    Line,
    clean,
    heat_class,
    heat_css,
    heat_step,
    ink,
    line_chart,
    score_range,
    shade,
    shorten,
    spark,
)
from launcher.report.plugins import plugin_view
from launcher.report.votes import vote_view

SCHEMA_VERSION = 1
DASH = "\N{EN DASH}"
MAX_LINES = 8
"""More tasks than this get a small chart each: nobody can tell nineteen lines or colours apart."""
KINDS = ("train", "generate", "rationalise", "record", "vote", "choose", "evaluate", "other")

Summary = Mapping[str, Any]
Row = Sequence[float | None]

COLUMNS = (  # metric, heading, whether more is better
    ("cl/avg_acc", "average accuracy", True),
    ("cl/f1_macro", "macro F1", True),
    ("cl/learning_acc", "when learned", True),
    ("cl/bwt", "backward transfer", True),
    ("cl/forgetting_max", "forgetting", False),
    ("cl/fwt_one", "forward transfer", True),
    ("cl/intransigence", "intransigence", False),
)
MEANING = {
    "cl/avg_acc": "Accuracy at the end, averaged over all tasks learned.",
    "cl/avg_inc_acc": "The same average taken after every task, averaged over the sequence.",
    "cl/bwt": "How much old tasks gained (above 0) or lost (below 0) since they were learned.",
    "cl/forgetting_max": "How far old tasks are below the best score they ever had.",
    "cl/forgetting_first": "How far old tasks are below their score when they were learned.",
    "cl/learning_acc": "Accuracy of each task right after learning it.",
    "cl/f1_macro": "Macro F1 at the end, averaged over all tasks learned.",
    "cl/fwt": "How much training on earlier tasks helps a task before it is learned.",
    "cl/fwt_one": "How much better tasks are learned in the sequence than by a model of their own (ONE).",
    "cl/intransigence": "How much worse tasks are learned in the sequence than when all are trained together.",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map table."""

    text: str
    style: str = ""
    note: str = ""


def write_report(summaries: Sequence[Summary], out_dir: Path) -> Path:
    """Write index.html and matrix.png on the first run, compared with the others; return the page's path.

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
    env = Environment(loader=PackageLoader("launcher"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.lstrip_blocks = True
    env.filters |= {"number": number, "duration": duration, "clean": clean, "shorten": shorten}
    page = out_dir / "index.html"
    write_text(page, env.get_template("report.html.j2").render(view(summaries)))
    _write_png(summaries[0], out_dir / "matrix.png")
    return page


def view(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return what the template shows; a section without data is None or empty."""
    main = summaries[0]
    accuracy = _square(main, "accuracy")
    num_learned = _num_learned(accuracy)
    f1 = _square(main, "f1_macro")
    return {
        "main": main,
        "css": heat_css(),
        "num_learned": num_learned,
        "tiles": _tiles(main, num_learned),
        "runs": _runs(summaries),
        "matrix": _matrix(main, accuracy, summaries) if num_learned else None,
        "f1": _matrix({**main, "references": {}}, f1, ()) if _num_learned(f1) else None,
        "mean_chart": _mean_chart(summaries),
        "task_chart": _task_chart(main, accuracy, num_learned),
        "plugins": plugin_view(main, accuracy) if main.get("plugins") else None,
        "replay": main.get("replay") or [],
        "votes": [vote_view(vote) for vote in main.get("votes") or []],
        "overlaps": [task for task in main["tasks"] if task.get("overlap")],
        "time": _time(main),
        "metrics": [(name, MEANING.get(name, ""), metric) for name, metric in main["metrics"].items()],
    }


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash for one that was not measured."""
    if value is None:
        return DASH
    value = round(value, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{'+' if sign and value else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Return seconds as a person would say them."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _square(summary: Summary, name: str) -> list[Row]:
    """Return a matrix with a row and a column per task, None where nothing was measured."""
    T = len(summary["tasks"])
    rows: list[Row] = [[*row, *[None] * T][:T] for row in summary["matrix"].get(name) or []]
    return [*rows, *[[None] * T for _ in range(T)]][:T]


def _num_learned(rows: Sequence[Row]) -> int:
    return max((t + 1 for t, row in enumerate(rows) if any(x is not None for x in row)), default=0)


def _value(summary: Summary, name: str) -> float | None:
    value: float | None = summary["metrics"].get(name, {}).get("value")
    return value


def _full_mean(values: Row) -> float | None:
    """Return the mean, or None if a value is missing."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _tiles(main: Summary, num_learned: int) -> list[tuple[str, str, str]]:
    """Return (heading, number, remark) of the four results that a reader looks for first."""
    majority = _full_mean([task.get("majority") for task in main["tasks"][:num_learned]])
    chance = "" if majority is None else f"majority class: {number(majority)}"
    tiles = [
        ("Average accuracy", number(_value(main, "cl/avg_acc")), chance),
        ("Macro F1", number(_value(main, "cl/f1_macro")), "mean over the tasks learned"),
        (
            "Backward transfer",
            number(_value(main, "cl/bwt"), sign=True),
            "change of old tasks; below 0 is forgetting",
        ),
    ]
    if (forward := _value(main, "cl/fwt_one")) is not None:
        return [*tiles, ("Forward transfer", number(forward, sign=True), "against a model per task")]
    return [
        *tiles,
        ("When learned", number(_value(main, "cl/learning_acc")), "accuracy right after learning a task"),
    ]


def _runs(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the comparison table, with the columns that any run can fill and the best of each marked."""
    names = [column for column in COLUMNS if any(_value(s, column[0]) is not None for s in summaries)]
    learned = [_num_learned(_square(s, "accuracy")) for s in summaries]
    ids = [[task["id"] for task in s["tasks"]] for s in summaries]
    alike = len({(tuple(i), n) for i, n in zip(ids, learned, strict=True)}) == 1
    rows = []
    for summary, num_learned in zip(summaries, learned, strict=True):
        cells = []
        for name, _, more in names:
            values = [v for s in summaries if (v := _value(s, name)) is not None]
            own = _value(summary, name)
            best = alike and len(values) > 1 and own == (max(values) if more else min(values))
            cells.append((number(own, sign=name in {"cl/bwt", "cl/fwt_one"}), best))
        seconds = [stage["seconds"] for stage in summary.get("stages") or []]
        rows.append((summary, num_learned, cells, duration(sum(seconds)) if seconds else DASH))
    alone = [s["run"] for s in summaries if s["method"] == "individual"]
    formulas = {n: m["formula"] for s in summaries for n, m in s["metrics"].items()}
    return {"columns": names, "rows": rows, "alike": alike, "alone": alone, "formulas": formulas}


def _matrix(main: Summary, rows: Sequence[Row], summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the heat map of scores, the references below it, and each task's change since it was learned."""
    tasks, T = main["tasks"], len(main["tasks"])
    digits = 3 if T <= MAX_LINES else 2
    majority = [task.get("majority") for task in tasks]
    extra: dict[str, Row] = {"majority class": majority} if summaries else {}
    for role, label in (("individual", "own model"), ("joint", "joint training")):
        name = (main.get("references") or {}).get(role)
        extra |= {f"{label} ({clean(s['run'])})": _reference(s, role, tasks) for s in summaries if s["run"] == name}
    known = [x for row in [*rows, *extra.values()] for x in row if x is not None]
    low, high = score_range(known)

    def cell(value: float | None, note: str, style: str = "") -> Cell:
        if value is None:
            return Cell("", "void", f"{note}: not measured")
        return Cell(number(value, digits), f"{style} {heat_class(value, low, high)}", f"{note}: {number(value, 4)}")

    body = []
    for t, row in enumerate(rows):
        cells = []
        for j, value in enumerate(row):
            if value is None and j > t:
                cells.append(Cell("", "later", f"{clean(tasks[j]['id'])} is not learned yet"))
                continue
            note = f"after {clean(tasks[t]['id'])}, on {clean(tasks[j]['id'])}"
            cells.append(cell(value, note, "learned" if j == t else ""))
        mean = cell(_full_mean(row[: t + 1]), "mean of the tasks learned so far")
        body.append((t + 1, clean(tasks[t]["id"]), cells, mean))
    below = []
    for label, values in extra.items():
        cells = [cell(x, f"{label}, {clean(task['id'])}") for x, task in zip(values, tasks, strict=True)]
        mean = cell(_full_mean(values), f"{label}, mean")
        below.append((label, cells, mean))
    last = max(_num_learned(rows) - 1, 0)
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
    rows, place = _square(summary, "accuracy"), {task["id"]: k for k, task in enumerate(summary["tasks"])}
    where = [place.get(task["id"]) for task in tasks]
    return [None if k is None else rows[k][k] if role == "individual" else rows[-1][k] for k in where]


def _means(summary: Summary) -> list[tuple[int, float]]:
    """Return (tasks learned, mean accuracy over them) where every score that it needs was measured."""
    rows = _square(summary, "accuracy")
    alone = summary["method"] == "individual"  # its models never see another task: task j keeps the score a[j,j]
    points = []
    for t, row in enumerate(rows):
        seen = [rows[j][j] for j in range(t + 1)] if alone else row[: t + 1]
        if (mean := _full_mean(seen)) is not None:
            points.append((t + 1, mean))
    return points


def _both_widths(lines: Sequence[Line], title: str) -> Markup | None:
    """Return a chart drawn for a desk and for a phone (CSS shows one), or None if there is no line to draw."""
    if not any(len(line.points) > 1 for line in lines):
        return None
    wide, narrow = (line_chart(lines, width, title) for width in (960, 350))
    return Markup('<div class="desk">{}</div><div class="phone">{}</div>').format(wide, narrow)


def _mean_chart(summaries: Sequence[Summary]) -> Markup | None:
    lines = [
        Line(s["run"], points, k, is_dashed=k > 0, is_main=k == 0)
        for k, s in enumerate(summaries)
        if (points := _means(s))
    ]
    return _both_widths(lines, "mean accuracy over the tasks learned so far, one line per run")


def _task_chart(main: Summary, rows: Sequence[Row], num_learned: int) -> dict[str, Any] | None:
    """Return one chart with a line per task, or, for many tasks, one small chart each."""
    tasks = main["tasks"][:num_learned]
    series = [
        [(t + 1, score) for t in range(j, num_learned) if (score := rows[t][j]) is not None] for j in range(num_learned)
    ]
    if not any(len(points) > 1 for points in series):
        return None
    named = [(j, task, points) for j, (task, points) in enumerate(zip(tasks, series, strict=True)) if points]
    if len(main["tasks"]) <= MAX_LINES:
        lines = [Line(f"{j + 1} {clean(task['id'])}", points, j) for j, task, points in named]
        return {"chart": _both_widths(lines, "accuracy of each task over the sequence"), "panels": []}
    bounds = score_range([score for points in series for _, score in points])
    panels = [
        (
            j + 1,
            clean(task["id"]),
            points[0][1],
            points[-1][1],
            len(points),
            spark(points, num_learned, bounds, task.get("majority")),
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

    rows, ids = _square(main, "accuracy"), [shorten(task["id"], 28) for task in main["tasks"]]
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
