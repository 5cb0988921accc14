"""A stored run shows itself in a notebook as its matrix and metrics."""

import re
from html import unescape
from typing import Any

from cl_dist.html_table import results_html
from cl_dist.metrics import summarize

HOSTILE = "<script>alert('x')</script>"


def summary(ids: list[str], accuracy: list[list[float | None]]) -> dict[str, Any]:
    return {
        "run": "tiny",
        "method": "ctr",
        "status": "finished",
        "tasks": [{"id": name} for name in ids],
        "matrix": {"accuracy": accuracy},
        "metrics": summarize(accuracy, accuracy),
    }


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)[1:]]


def test_the_matrix_and_the_metrics_are_shown() -> None:
    html = results_html(summary(["food", "film"], [[0.9, None], [0.8, 0.7]]))
    assert cells(html) == [["0.900", ""], ["0.800", "0.700"]]
    assert "tiny</b>: ctr, finished, 2 of 2 tasks learned" in html
    assert "accuracy 0.750" in html
    assert "forgetting 0.100" in html
    assert "after film, on food: 0.8000" in html


def test_intervals_are_shown_where_the_summary_has_them() -> None:
    found = summary(["food"], [[0.9]])
    found["metrics"]["cl/avg_acc"]["interval"] = [0.85, 0.95]
    assert "accuracy 0.900 (0.850 to 0.950)" in results_html(found)


def test_many_tasks_are_a_list_and_nothing_measured_is_blank() -> None:
    ids = [f"task{k}" for k in range(20)]
    html = results_html(summary(ids, [[0.5] * (t + 1) + [None] * (19 - t) for t in range(20)]))
    assert cells(html) == [["0.500", "0.500"]] * 20
    assert len(html) < 10_000
    assert "0 of 1 tasks learned" in results_html(summary(["food"], [[None]]))


def test_names_are_escaped() -> None:
    html = results_html(summary([HOSTILE, "film"], [[0.9, None], [0.8, 0.7]]) | {"run": HOSTILE, "method": HOSTILE})
    assert "<script" not in html
    assert unescape(html).count("alert") > 3
