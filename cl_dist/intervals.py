"""Confidence intervals of scores: Wilson for one proportion, a bootstrap over rows within tasks for means.

They cover the choice of test rows only. Tasks, models and seeds are fixed: another training run may differ by more.

Axes: N rows of a task, S scores of a row, D bootstrap draws.
Source: Wilson 1927, "Probable inference"; Efron 1979, "Bootstrap methods" (percentile limits); Zou and Donner 2008,
"Construction of confidence limits about effect measures" (limits of a sum from the limits of its terms).
"""

from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
LEVEL = 0.95
"""Level of every reported interval."""
DRAWS = 10_000
"""Bootstrap draws of an interval: its ends vary by 3 % of a standard error between seeds."""
_CELLS = 2_000_000
"""Counts drawn at once, which bounds memory to 16 MB."""


def wilson(right: int, rows: int, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a proportion: right / rows, such as an accuracy.

        p = right / rows, z = the (1 + level) / 2 quantile of the standard normal distribution
        (p + z^2 / (2 rows) -+ z sqrt(p (1 - p) / rows + z^2 / (4 rows^2))) / (1 + z^2 / rows)

    It contains p, lies within [0, 1] and has a length above 0 also where all or no rows are right.

    Raises:
        ValueError: If there are no rows, or right lies outside 0..rows.
    """
    if not 0 <= right <= rows or rows < 1:
        raise ValueError(f"right={right}, rows={rows}: expected 0 <= right <= rows and at least one row")
    z = _quantile(level)
    share, square = right / rows, z * z / rows
    middle, half = share + square / 2, z * sqrt(share * (1 - share) / rows + square / (4 * rows))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return 0.0 if right == 0 else min(low, share), 1.0 if right == rows else max(high, share)


def mean_interval(
    correct_by_task: Sequence[NDArray[Any]],
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
    is_difference: bool = False,
) -> Interval:
    """Return the interval of the mean over tasks of each task's mean over rows, such as cl/avg_acc.

        m = 1/T sum_j mean(x_j)
        m_d = 1/T sum_j mean(N_j rows drawn from x_j with replacement)       for each draw d
        l, h = the (1 - level) / 2 and (1 + level) / 2 quantiles of m_d
        low = m - sqrt((m - l)^2 + 1/T^2 sum_c (p_c - l_c)^2), high likewise with h_c - p_c

    c are tasks where all rows are right or all wrong. Their draws are all equal, so the Wilson interval (l_c, h_c) of
    p_c = 1 or 0 stands in for them. One task of right and wrong rows gets its Wilson interval. The result contains m,
    depends on no order of rows, and is the same for every call with these arguments.

    Args:
        correct_by_task: Per task the values of its rows, shape (N,): right as 1 and wrong as 0, or any row score.
            Values of one row under two models, subtracted, give the interval of a paired difference.
        level: Share of such intervals that contain the mean over all rows of the kind of the test rows.
        draws: Number of bootstrap draws.
        seed: Seed of the draws; task j uses the stream (seed, j).
        is_difference: Values are differences: 0 and 1 are then no wrong and right rows, and tasks where no row differs
            have an interval of length 0.

    Raises:
        ValueError: If there is no task, or a task without rows.
    """
    tasks = [np.asarray(values, dtype=np.float64) for values in correct_by_task]
    if not tasks or any(values.ndim != 1 or not values.size for values in tasks):
        raise ValueError("correct_by_task: expected one array of shape (N,) per task, each with at least one row")
    is_share = not is_difference and all(((values == 0) | (values == 1)).all() for values in tasks)
    if is_share and len(tasks) == 1:
        return wilson(int(tasks[0].sum()), tasks[0].size, level)
    drawn = [means[:, 0] for means in resampled([values[:, None] for values in tasks], draws, seed)]
    middle = float(np.mean([values.mean() for values in tasks]))
    constant = [(int(v.sum()), v.size) for v in tasks if is_share and v.min() == v.max()]
    return _around(middle, np.mean(drawn, axis=0), constant, len(tasks), level)


def resampled(tasks: Sequence[Array], draws: int = DRAWS, seed: int = 0) -> Iterator[Array]:
    """Yield per task the means of the scores of its rows in every bootstrap draw: (N, S) -> (D, S).

    A draw has N rows, drawn with replacement; the scores of a row stay together. Drawing rows one by one and drawing
    how often each distinct row of scores occurs (multinomial) are the same distribution; the latter is fast.
    """
    for number, values in enumerate(tasks):
        yield _resampled(values, draws, np.random.default_rng([seed, number]))


def percentiles(drawn: Array, level: float = LEVEL) -> Interval:
    """Return the percentile limits of a statistic from its bootstrap draws, shape (D,)."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def half_width(interval: Interval) -> float:
    """Return half of the length of an interval: the number behind a ± sign."""
    return (interval[1] - interval[0]) / 2


def _around(middle: float, drawn: Array, constant: Sequence[tuple[int, int]], num_tasks: int, level: float) -> Interval:
    """Return percentile limits around a mean, with the Wilson intervals of constant tasks added in quadrature."""
    low, high = percentiles(drawn, level)
    below, above = max(middle - low, 0.0) ** 2, max(high - middle, 0.0) ** 2
    for right, rows in constant:
        least, most = wilson(right, rows, level)
        below += ((right / rows - least) / num_tasks) ** 2
        above += ((most - right / rows) / num_tasks) ** 2
    return middle - sqrt(below), middle + sqrt(above)


def _resampled(values: Array, draws: int, rng: np.random.Generator) -> Array:
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    if len(distinct) == 1:
        return np.repeat(distinct, draws, axis=0)
    at_once = max(1, _CELLS // len(distinct))
    parts = (
        rng.multinomial(len(values), counts / len(values), size=min(at_once, draws - start)) @ distinct
        for start in range(0, draws, at_once)
    )
    return np.concatenate(list(parts)) / len(values)


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1")
    return NormalDist().inv_cdf((1 + level) / 2)
