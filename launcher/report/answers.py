"""Answers of the last model on test rows: confusion matrix, scores per label, the most certain mistakes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cl_dist.intervals import wilson
from launcher.report.figures import clean, heat_class
from launcher.report.stored import Answer, Details

MOST_LABELS = 12
"""Labels of a confusion matrix; with more, the most frequent confusions are listed instead."""
MOST_LINES = 30
MISTAKES = 10
TEXT_LIMIT = 300
OTHER = "other"


def answer_views(details: Details, main: Mapping[str, Any], num_learned: int) -> list[dict[str, Any]]:
    """Return the view of each task's test rows as the last model answers them, for tasks with stored answers."""
    views = []
    for j, task in enumerate(main["tasks"][:num_learned]):
        if found := details.answers(num_learned - 1, j):
            views.append({"number": j + 1, "id": clean(task["id"]), **_view(found, task["labels"])})
    return views


def _view(answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
    wrong = [a for a in answers if a.label != a.prediction]
    counts = Counter((a.label, a.prediction if a.prediction in labels else OTHER) for a in answers)
    shown = list(labels) if len(labels) <= MOST_LABELS else []
    is_certain = bool(wrong) and all(a.probability is not None for a in wrong)
    worst = sorted(wrong, key=lambda a: -(a.probability or 0.0))[:MISTAKES]
    return {
        "rows": len(answers),
        "wrong": len(wrong),
        "right": wilson(len(answers) - len(wrong), len(answers)),
        "confusion": _confusion(counts, shown) if shown else None,
        "pairs": [] if shown or not labels else _pairs(counts),
        "labels": _per_label(counts, labels)[:MOST_LINES],
        "more_labels": max(0, len(labels) - MOST_LINES),
        "is_certain": is_certain,
        "mistakes": [(excerpt(a.text), clean(a.label), excerpt(a.prediction), a.probability) for a in worst],
    }


def excerpt(text: str) -> str:
    """Return the beginning of a text as one visible line."""
    text = clean(text)
    return text if len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"


def _confusion(counts: Mapping[tuple[str, str], int], labels: Sequence[str]) -> dict[str, Any]:
    """Return the matrix with a row per label and a column per prediction, shaded by the share of the row."""
    columns = [*labels, *([OTHER] if any(guess == OTHER for _, guess in counts) else [])]
    rows = []
    for label in labels:
        total = sum(counts.get((label, guess), 0) for guess in columns)
        cells = []
        for guess in columns:
            count = counts.get((label, guess), 0)
            if not count:
                cells.append(("", "", ""))
                continue
            note = f"{count} of {total} rows of {clean(label)} answered {clean(guess)}"
            style = heat_class(count / total, 0, 1, "blue" if guess == label else "orange")
            cells.append((str(count), style, note))
        rows.append((clean(label), cells))
    return {"columns": [clean(guess) for guess in columns], "rows": rows}


def _pairs(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions as (label, prediction, rows)."""
    wrong = [(count, label, guess) for (label, guess), count in counts.items() if label != guess]
    return [
        (clean(label), clean(guess), count) for count, label, guess in sorted(wrong, key=lambda w: -w[0])[:MISTAKES]
    ]


def _per_label(counts: Mapping[tuple[str, str], int], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and rows of each label, the label with the most rows first."""
    given: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    for (label, guess), count in counts.items():
        given[label] += count
        guessed[guess] += count
    lines = []
    for label in labels:
        right, rows, guesses = counts.get((label, label), 0), given[label], guessed[label]
        lines.append(
            {
                "label": clean(label),
                "precision": right / guesses if guesses else None,
                "recall": right / rows if rows else None,
                "f1": 2 * right / (rows + guesses) if rows + guesses else None,
                "rows": rows,
                "recall_interval": wilson(right, rows) if rows else None,
            }
        )
    return sorted(lines, key=lambda line: -line["rows"])
