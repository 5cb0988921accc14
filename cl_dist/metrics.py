"""Accuracy matrix, continual-learning metrics, and the scores that fill the matrix.

Notation: a[t,j] is the score on task j after task t was learned, tasks counted from 1; T is the number of tasks
learned so far, b[j] the score before all training, J[j] that of joint training, ONE[j] that of a model
trained on task j alone. Cells that were not measured are nan, and a metric that needs one is None: never 0,
never an average over the other cells.
Source: Lopez-Paz and Ranzato 2017 (GEM) for bwt and fwt; Chaudhry et al. 2018 (RWalk) for forgetting_max and
intransigence; Ke et al. 2021 (CTR) for forgetting_first and fwt_one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Metric = dict[str, Any]
Scores = ArrayLike | Sequence[float | None] | Sequence[Sequence[float | None]]
"""Scores as an array, or as the nested lists of `summary.json`, where None is a cell that was not measured."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric of a run, as every page, table and terminal names it."""

    word: str
    """Name of the metric in prose and in table headings."""
    formula: str
    meaning: str
    more_is_better: bool = True
    is_difference: bool = False
    """Whether it is a difference of scores, which is printed with its sign."""


DEFINITIONS: dict[str, Definition] = {
    "cl/avg_acc": Definition("accuracy", "1/T sum_j a[T,j]", "Accuracy at the end, averaged over all tasks learned."),
    "cl/avg_inc_acc": Definition(
        "incremental accuracy",
        "1/T sum_t (1/t sum_{j<=t} a[t,j])",
        "The same average taken after every task, averaged over the sequence.",
    ),
    "cl/bwt": Definition(
        "backward transfer",
        "1/(T-1) sum_{j<T} (a[T,j] - a[j,j])",
        "How much old tasks gained (above 0) or lost (below 0) since they were learned.",
        is_difference=True,
    ),
    "cl/forgetting_max": Definition(
        "forgetting",
        "1/(T-1) sum_{j<T} (max_{j<=l<T} a[l,j] - a[T,j])",
        "How far old tasks are below the best score they ever had.",
        more_is_better=False,
    ),
    "cl/forgetting_first": Definition(
        "forgetting since learned",
        "1/(T-1) sum_{j<T} (a[j,j] - a[T,j])",
        "How far old tasks are below their score when they were learned.",
        more_is_better=False,
    ),
    "cl/learning_acc": Definition("when learned", "1/T sum_j a[j,j]", "Accuracy of each task right after learning it."),
    "cl/f1_macro": Definition("macro F1", "1/T sum_j f1[T,j]", "Macro F1 at the end, averaged over all tasks learned."),
    "cl/fwt": Definition(
        "forward transfer",
        "1/(T-1) sum_{j>=2} (a[j-1,j] - b[j])",
        "How much training on earlier tasks helps a task before it is learned.",
        is_difference=True,
    ),
    "cl/fwt_one": Definition(
        "transfer vs. own model",
        "1/T sum_j (a[j,j] - ONE[j])",
        "How much better tasks are learned in the sequence than by a model of their own (ONE).",
        is_difference=True,
    ),
    "cl/intransigence": Definition(
        "intransigence",
        "1/T sum_j (J[j] - a[j,j])",
        "How much worse tasks are learned in the sequence than when all are trained together.",
        more_is_better=False,
        is_difference=True,
    ),
}
"""The metrics of a run: the only place of their words, formulas and meanings.

forgetting_max ignores scores from before a task is learned, which exist for fwt."""

FORMULAS: dict[str, str] = {name: metric.formula for name, metric in DEFINITIONS.items()}
"""Formula of each metric, as in `summary.json`."""


def summarize(
    accuracy: Scores,
    f1: Scores,
    *,
    individual: Scores | None = None,
    joint: Scores | None = None,
    before: Scores | None = None,
) -> dict[str, Metric]:
    """Return every metric as {"value": number or None, "formula": text}.

    In an unfinished sequence T is the last row with a measured cell, and the metrics cover the tasks up to it.

    Args:
        accuracy: a, shape (T_after, T_on); nan or None for cells that were not measured.
        f1: Macro F1, same shape.
        individual: ONE, the diagonal of a run that trains each task alone, shape (T_on,).
        joint: J, the final row of a run that trains all tasks together, shape (T_on,).
        before: b, scores of the untrained model, shape (T_on,). `cl/fwt` is present only if this is given and
            the cells a[j-1,j] were measured.

    Raises:
        ValueError: If the shapes do not fit.
    """
    a, macro = _matrix(accuracy, "accuracy"), _matrix(f1, "f1")
    if a.shape != macro.shape:
        raise ValueError(f"f1 has shape {macro.shape}: expected that of accuracy, {a.shape}")
    num_tasks = a.shape[1]
    one, upper, start = (
        _vector(given, num_tasks, name)
        for name, given in (("individual", individual), ("joint", joint), ("before", before))
    )
    T = _num_learned(a)
    a, macro = a[:T, :T], macro[:T, :T]
    diagonal, last, old = np.diag(a), a[T - 1 :].ravel(), slice(0, max(T - 1, 0))
    steps = [a[t, : t + 1].mean() for t in range(T)]
    peak = np.array([a[j : T - 1, j].max() for j in range(T - 1)])
    values = {
        "cl/avg_acc": _mean(last),
        "cl/avg_inc_acc": _mean(np.array(steps)),
        "cl/bwt": _mean(last[old] - diagonal[old]),
        "cl/forgetting_max": _mean(peak - last[old]),
        "cl/forgetting_first": _mean(diagonal[old] - last[old]),
        "cl/learning_acc": _mean(diagonal),
        "cl/f1_macro": _mean(macro[T - 1 :].ravel()),
        "cl/fwt_one": _mean(diagonal - one[:T]),
        "cl/intransigence": _mean(upper[:T] - diagonal),
    }
    transfer = _mean(np.diag(a, k=1) - start[1:T])
    if transfer is not None:
        values["cl/fwt"] = transfer
    return {name: {"value": values[name], "formula": formula} for name, formula in FORMULAS.items() if name in values}


def accuracy(labels: Sequence[object], predictions: Sequence[object]) -> float:
    """Return the fraction of predictions that equal their label."""
    return sum(label == guess for label, guess in _pairs(labels, predictions)) / len(labels)


def f1_macro(labels: Sequence[object], predictions: Sequence[object]) -> float:
    """Return the unweighted mean of each class's F1 = 2 tp / (2 tp + fp + fn).

    The mean is over the classes that occur in labels or predictions, as in scikit-learn; a class that is only
    predicted counts as 0.
    """
    pairs = _pairs(labels, predictions)
    classes = {*labels, *predictions}
    hits = dict.fromkeys(classes, 0)
    size = dict.fromkeys(classes, 0)  # labels and predictions of a class: 2 tp + fp + fn
    for label, guess in pairs:
        hits[label] += label == guess
        size[label] += 1
        size[guess] += 1
    return sum(2 * hits[name] / size[name] for name in classes) / len(classes)


def majority_accuracy(train_labels: Sequence[object], test_labels: Sequence[object]) -> float:
    """Return the test accuracy of always predicting the most frequent train label (ties: the first sorted)."""
    if len(train_labels) == 0:
        raise ValueError("train_labels is empty: expected at least one label")
    counts: dict[object, int] = {}
    for label in train_labels:
        counts[label] = counts.get(label, 0) + 1
    best = max(counts.values())
    answer = min((label for label, count in counts.items() if count == best), key=str)
    return accuracy(test_labels, [answer] * len(test_labels))


def _pairs(labels: Sequence[object], predictions: Sequence[object]) -> list[tuple[object, object]]:
    if len(labels) == 0 or len(labels) != len(predictions):
        raise ValueError(f"{len(labels)} labels, {len(predictions)} predictions: expected equal counts above 0")
    return list(zip(labels, predictions, strict=True))


def _mean(values: Array) -> float | None:
    """Return the mean, or None if there are no cells or one was not measured."""
    return float(values.mean()) if values.size and not np.isnan(values).any() else None


def _num_learned(a: Array) -> int:
    measured = np.flatnonzero(~np.isnan(a).all(axis=1))
    return int(measured[-1]) + 1 if a.size and measured.size else 0


def _matrix(given: Scores, name: str) -> Array:
    matrix = np.array(given, dtype=np.float64)
    if matrix.size == 0:
        return np.empty((0, 0))
    if matrix.ndim != 2 or matrix.shape[0] > matrix.shape[1]:
        raise ValueError(f"{name} has shape {matrix.shape}: expected (T_after, T_on) with T_after <= T_on")
    return matrix


def _vector(given: Scores | None, num_tasks: int, name: str) -> Array:
    if given is None:
        return np.full(num_tasks, np.nan)
    vector = np.array(given, dtype=np.float64)
    if vector.shape != (num_tasks,):
        raise ValueError(f"{name} has shape {vector.shape}: expected one score per task, ({num_tasks},)")
    return vector
