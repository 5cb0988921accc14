"""One page over all runs below a folder: a table that a small inline script sorts, without a network."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cl_dist.errors import ClDistError
from cl_dist.html_table import METRICS
from cl_dist.ledger import write_text
from cl_dist.metrics import DEFINITIONS
from cl_dist.run_events import read_state
from cl_dist.stored_run import status_of
from launcher.report.comparison import ROLES, num_learned, square, value
from launcher.report.figures import clean, heat_css
from launcher.report.numbers import DASH, duration, number, span
from launcher.report.page import SCHEMA_VERSION, environment

SORT = """
for (const head of document.querySelectorAll('th[data-kind]')) {
  const button = head.querySelector('button');
  button.addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') !== 'descending';
    for (const other of document.querySelectorAll('th[data-kind]')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const place = [...head.parentNode.children].indexOf(head), body = document.querySelector('tbody');
    const key = (row) => row.children[place].dataset.key;
    const compare = (a, b) => {
      if (key(a) === '' || key(b) === '') return (key(a) === '') - (key(b) === '');
      const order = head.dataset.kind === 'number' ? key(a) - key(b) : key(a).localeCompare(key(b));
      return down ? -order : order;
    };
    body.append(...[...body.children].sort(compare));
  });
}
"""
"""Sorts the rows by a column; empty cells stay at the end. The policy of the page admits this text alone, by digest."""


def write_index(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Write index.html over the runs below a folder, the latest first; return its path and the runs as plain data."""
    runs = sorted((_entry(folder, found, path) for path, found in _summaries(folder)), key=lambda run: run["started"])
    runs.reverse()
    page = folder / "index.html"
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    columns = [(name, DEFINITIONS[name]) for name in METRICS if any(run["metrics"][name] is not None for run in runs)]
    text = (
        environment()
        .get_template("index.html.j2")
        .render(
            runs=runs, columns=columns, script=SORT, digest=digest, css=heat_css(), name=clean(folder.resolve().name)
        )
    )
    write_text(page, text)
    return page, [{key: run[key] for key in ("path", "method", "status", "learned", "metrics")} for run in runs]


def _summaries(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the run folders below a folder, baselines included, with their summaries; skip unreadable ones."""
    for path in sorted(folder.rglob("metrics/summary.json")):
        try:
            found = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION:
            yield path.parents[1], found


def _entry(folder: Path, summary: Mapping[str, Any], path: Path) -> dict[str, Any]:
    stages = summary.get("stages") or []
    seconds = sum(stage["seconds"] for stage in stages)
    started = min((str(stage.get("started") or "") for stage in stages), default="")
    page = path / "report" / "index.html"
    relative = os.path.relpath(path, folder)
    interval = summary["metrics"].get("cl/avg_acc", {}).get("interval")
    return {
        "path": clean(relative),
        "label": clean(relative.replace(os.sep, "/").replace("/baselines/", " / ")),
        "address": quote(f"{relative}/report/index.html".replace(os.sep, "/")) if page.is_file() else None,
        "method": clean(summary["method"]),
        "role": ROLES.get(summary["method"], ""),
        "seed": summary["seed"],
        "status": clean(_status(path, summary)),
        "learned": num_learned(square(summary, "accuracy")),
        "tasks": len(summary["tasks"]),
        "model": clean(summary["model"]),
        "metrics": {name: value(summary, name) for name in METRICS},
        "texts": {name: number(value(summary, name), sign=DEFINITIONS[name].is_difference) for name in METRICS},
        "interval": "" if interval is None else f"95 % interval over test rows: {span(interval)}",
        "seconds": seconds,
        "time": duration(seconds) if stages else DASH,
        "started": started,
        "when": _when(started),
    }


def _status(path: Path, summary: Mapping[str, Any]) -> str:
    """Return a run's present status: the summary of a killed run says "running" for ever."""
    with suppress(ClDistError, OSError):
        if state := read_state(path):
            return status_of(state)
    return str(summary["status"])


def _when(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%Y-%m-%d %H:%M}"
    except ValueError:
        return DASH
