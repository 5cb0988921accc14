"""Results of a run as a small HTML table, for notebooks. Torch-free.

Every text is escaped. Colours are transparent, so that they suit light and dark notebooks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cl_dist.metrics import DEFINITIONS

METRICS = ("cl/avg_acc", "cl/f1_macro", "cl/forgetting_max", "cl/bwt", "cl/fwt_one")
MOST_COLUMNS = 12
"""Runs of more tasks are shown as a list of tasks, with their first and last score."""
LONGEST_NAME = 24

_CELL = Markup('<td style="text-align:right;background:rgba(0,114,178,{:.2f})" title="{}">{}</td>')
_HEAD = Markup('<th style="text-align:{}" title="{}">{}</th>')


def results_html(summary: Mapping[str, Any]) -> str:
    """Return the accuracy matrix and the metrics of a run's summary as HTML."""
    ids = [str(task["id"]) for task in summary["tasks"]]
    T = len(ids)
    rows = [[*row, *[None] * T][:T] for row in summary["matrix"]["accuracy"]]
    learned = [t for t, row in enumerate(rows) if any(score is not None for score in row)]
    last = learned[-1] if learned else -1
    head = Markup("<b>{}</b>: {}, {}, {} of {} tasks learned").format(
        summary["run"], summary["method"], summary["status"], last + 1, T
    )
    table = _matrix(ids, rows) if T <= MOST_COLUMNS else _list(ids, rows, last)
    return Markup("<div><p>{}</p>{}<p>{}</p></div>").format(head, table, _metrics(summary["metrics"]))


def _matrix(ids: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Markup:
    head = Markup("").join(
        [_HEAD.format("left", "", "after ↓ on →"), *(_HEAD.format("right", n, _short(n)) for n in ids)]
    )
    body = [
        Markup("<tr>{}{}</tr>").format(
            _HEAD.format("left", after, _short(after)),
            Markup("").join(_cell(score, f"after {after}, on {on}") for on, score in zip(ids, row, strict=True)),
        )
        for after, row in zip(ids, rows, strict=False)
    ]
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, Markup("").join(body))


def _list(ids: Sequence[str], rows: Sequence[Sequence[float | None]], last: int) -> Markup:
    head = Markup("").join(_HEAD.format("left", "", name) for name in ("task", "when learned", "now"))
    body = [
        Markup("<tr>{}{}{}</tr>").format(
            _HEAD.format("left", name, _short(name)),
            _cell(rows[j][j], f"{name} when learned"),
            _cell(rows[last][j], f"{name} now"),
        )
        for j, name in enumerate(ids[: last + 1])
    ]
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, Markup("").join(body))


def _cell(score: float | None, note: str) -> Markup:
    if score is None:
        return Markup("<td></td>")
    return _CELL.format(0.05 + 0.45 * max(0.0, min(1.0, score)), f"{note}: {score:.4f}", f"{score:.3f}")


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name in METRICS:
        number, interval = metrics.get(name, {}).get("value"), metrics.get(name, {}).get("interval")
        if number is not None:
            span = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
            parts.append(f"{DEFINITIONS[name].word} {number:.3f}{span}")
    return ", ".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
