"""Statistics of studies: intervals, tests and verdicts for paired runs of two arms. Needs numpy alone.

Notation: P pairs (an order of the tasks with a seed; both arms of a comparison run it), J tasks, n_j test rows of task
j. z[p,j,i] is what row i adds to a metric, with mean x[p,j] over i; for a comparison it is the difference of two arms.
The estimate is the mean over pairs of the mean over tasks of x.

Its variance is that of a multiway cluster bootstrap (Cameron, Gelbach and Miller 2011): rows (or tasks) and pairs are
crossed, since every pair scores the same rows, and both are drawn anew. Resampling pairs alone gives A, resampling rows
(tasks) alone gives B, and both hold the noise of single cells, which resampling cells gives as C: V = A + B - C. All
three are the closed forms of the bootstrap's variance, with the factors k/(k-1) that a bootstrap of k clusters lacks.
Where A < C the variance between pairs beyond the noise of cells comes out negative and counts as 0: V = B; the same
holds for B < C. With two pairs, where A is a single square, this takes A < C / 2. The interval uses Student's t with
the degrees of freedom of Satterthwaite (1946), because A has only P - 1 of them: with few clusters the quantiles of a
bootstrap are too narrow.

Tasks are either "fixed" (rows are drawn within each task: the claim covers these tasks) or "sampled" (whole tasks are
drawn, with their rows, which are nested in them: the claim covers tasks of this kind).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = Sequence[Array]
"""z as one array (pairs, rows) per task; a pair for which the metric does not cover a task has nan there."""
Scope = Literal["sampled", "fixed"]
Kind = Literal["better", "worse", "equal", "undecided"]
POWER = 0.8
MANY = 1e5
"""Degrees of freedom from which Student's t is the normal distribution."""
_CELLS = 2_000_000
"""Counts drawn at once, which bounds memory to 16 MB."""
MAX_PAIRS = 1000
"""Largest number of pairs that `further_pairs` considers."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty; fields that the data cannot give are None."""

    value: float
    pairs: int
    se: float | None = None
    df: float | None = None
    """Degrees of freedom of the standard error."""
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """Two-sided p-value of the hypothesis that the true value is 0."""
    p_equal: float | None = None
    """p-value of the hypothesis that the true value is outside the margin: below .05 if the interval is inside it."""
    detectable: float | None = None
    """Smallest true difference that this design finds with 80 % power at a two-sided level of 5 %."""
    of_pairs: float = 0.0
    """Part of the variance that more pairs reduce."""
    of_units: float = 0.0
    """Part of the variance that only more rows (or tasks) reduce."""
    units: int = 0
    """Degrees of freedom of that part."""


@dataclass(frozen=True, slots=True)
class Counts:
    """An exact two-sided test of equal chances: wins, losses and p-value; ties do not count."""

    wins: int
    losses: int
    p: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a comparison."""

    kind: Kind
    within_margin: bool
    """Whether the whole interval lies inside the margin."""
    further_pairs: int | None = None
    """For "undecided": the pairs that are missing for a decision; None if no number up to MAX_PAIRS suffices."""


def estimate(rows: Rows, tasks: Scope = "sampled", margin: float = 0.0, level: float = 0.95) -> Estimate | None:
    """Return the mean of a metric over pairs and tasks with its interval; None if no pair has a value.

    One pair gives an interval of rows (or tasks) alone, without the variation between orders and seeds.
    """
    x = _cells(rows)
    measured = ~np.isnan(x)
    if not measured.any():
        return None
    pairs, covered = np.flatnonzero(measured.any(axis=1)), np.flatnonzero(measured.any(axis=0))
    x, measured = x[pairs][:, covered], measured[pairs][:, covered]
    rows = [rows[int(j)][pairs] for j in covered]
    P = len(x)
    w = measured / measured.sum(axis=1, keepdims=True) / P
    value = float(np.nansum(w * x))
    if tasks == "fixed" or x.shape[1] == 1:
        A, B, C, num_units = _fixed(rows, x, w)
    else:
        A, B, C, num_units = _sampled(x, w, value)
    if num_units < 1:
        return Estimate(value, P)
    noise = C if P > 2 else C / 2
    if P == 1 or noise >= A:
        variance = max(A, B) if noise >= B else B
        spread = variance**2 / num_units
    elif noise >= B:
        variance, spread = A, A**2 / (P - 1)
    else:
        variance = max(A, B, A + B - C)
        spread = A**2 / (P - 1) + B**2 / num_units + C**2 / ((P - 1) * num_units)
    if variance == 0:
        return Estimate(value, P, 0.0, math.inf, value, value, 0.0 if value else 1.0, float(abs(value) >= margin), 0.0)
    se, df = math.sqrt(variance), max(1.0, variance**2 / spread)
    reach = t_quantile((1 + level) / 2, df) * se
    return Estimate(
        value=value,
        pairs=P,
        se=se,
        df=df,
        low=value - reach,
        high=value + reach,
        p=2 * t_tail(abs(value) / se, df),
        p_equal=min(1.0, 2 * t_tail((margin - abs(value)) / se, df)),
        detectable=detectable(se, df),
        of_units=(of_units := max(B - C, 0.0)),
        of_pairs=variance - of_units,
        units=num_units,
    )


def _cells(rows: Rows) -> Array:
    """Return x, shape (pairs, tasks)."""
    return np.stack([part.mean(axis=1) for part in rows], axis=1)


def _sampled(x: Array, w: Array, value: float) -> tuple[float, float, float, int]:
    """Return A, B, C and the degrees of freedom of B, where whole tasks are drawn."""
    P, J = x.shape
    shares = np.nan_to_num(w * (x - value))
    B = J / (J - 1) * float((shares.sum(axis=0) ** 2).sum())
    if P == 1:
        return 0.0, B, 0.0, J - 1
    A = P / (P - 1) * float((shares.sum(axis=1) ** 2).sum())
    rest = x - np.nanmean(x, axis=1, keepdims=True) - _mean(x) + value
    C = P * J / ((P - 1) * (J - 1)) * float((np.nan_to_num(w * rest) ** 2).sum())
    return A, B, C, J - 1


def _fixed(rows: Rows, x: Array, w: Array) -> tuple[float, float, float, int]:
    """Return A, B, C and the degrees of freedom of B, where rows are drawn within each task."""
    P = len(x)
    A = P / (P - 1) * float((np.nan_to_num(w * (x - _mean(x))).sum(axis=1) ** 2).sum()) if P > 1 else 0.0
    B, C, num_units = 0.0, 0.0, 0
    for j, part in enumerate(rows):
        n = part.shape[1]
        if n < 2:
            continue
        own = part - x[:, j : j + 1]
        shares = w[:, j : j + 1] / n
        B += n / (n - 1) * float((np.nan_to_num(shares * own).sum(axis=0) ** 2).sum())
        num_units += n - 1
        if P > 1:
            rest = own - _mean(own)
            C += P * n / ((P - 1) * (n - 1)) * float((np.nan_to_num(shares * rest) ** 2).sum())
    return A, B, C, num_units


def _mean(values: Array) -> Array:
    """Return the mean over pairs, leaving out nan values; 0 where all are nan."""
    known = ~np.isnan(values)
    mean: Array = np.nan_to_num(values).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return mean


def bootstrap(
    rows: Rows, tasks: Scope = "sampled", draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the joint bootstrap: pairs and, crossed with them, rows (or tasks) drawn anew.

    For comparison with `estimate`, whose interval this approaches with many pairs.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    P, J = len(rows[0]), len(rows)
    x = np.broadcast_to(_cells(rows), (draws, P, J))
    if tasks == "fixed":
        x = np.stack([_redrawn(part, draws, generator) for part in rows], axis=2)
    else:
        x = np.take_along_axis(x, generator.integers(J, size=(draws, 1, J)), axis=2)
    x = np.take_along_axis(x, generator.integers(P, size=(draws, P, 1)), axis=1)
    known = ~np.isnan(x)
    sizes = known.sum(axis=2)  # 0 for a draw of tasks that the metric does not cover
    means = np.nan_to_num(x).sum(axis=2) / np.maximum(sizes, 1)
    totals = (means * (sizes > 0)).sum(axis=1) / np.maximum((sizes > 0).sum(axis=1), 1)
    low, high = np.quantile(totals[sizes.any(axis=1)], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _redrawn(part: Array, draws: int, generator: np.random.Generator) -> Array:
    """Return each pair's mean over rows, drawn with replacement: (pairs, rows) -> (draws, pairs)."""
    num = part.shape[1]
    at_once = max(1, _CELLS // num)
    parts = [
        generator.multinomial(num, [1 / num] * num, min(at_once, draws - first)) @ part.T / num
        for first in range(0, draws, at_once)
    ]
    return np.concatenate(parts)


def sign_test(rows: Rows) -> Counts:
    """Test over pairs: in how many is the mean over tasks above 0, in how many below.

    All pairs score the same rows, so the result covers these rows; others are not part of it.
    """
    x = _cells(rows)
    means = np.nan_to_num(x).sum(axis=1)
    means = np.where(np.abs(means) < 1e-12, 0.0, means)
    return _exact(int((means > 0).sum()), int((means < 0).sum()))


def mcnemar(rows: Rows) -> Counts:
    """Test over rows of a difference of two arms that are right or wrong: exact McNemar.

    A row counts once, for the arm that is right in more pairs: rows of different pairs are not independent. The result
    covers these pairs; other orders and seeds are not part of it.
    """
    sums = np.concatenate([np.nan_to_num(part).sum(axis=0) for part in rows])
    return _exact(int((sums > 0).sum()), int((sums < 0).sum()))


def _exact(wins: int, losses: int) -> Counts:
    """Return the two-sided binomial test with chance 1/2."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return Counts(0, 0, 1.0)
    steps = np.arange(1, k + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n - steps + 1.0) - np.log(steps))]) - n * math.log(2)
    return Counts(wins, losses, min(1.0, 2 * float(np.exp(logs).sum())))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of several hypotheses, adjusted so that the chance of any false rejection stays at the level.

    Holm (1979).
    """
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for number, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - number) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdict(found: Estimate, margin: float, p: float | None = None, p_equal: float | None = None) -> Verdict:
    """Return the verdict on a difference.

    "better" and "worse": the hypothesis of no difference is rejected at 5 %. "equal": it is not, and the interval lies
    inside the margin (two one-sided tests, each at 2.5 %). A single pair decides nothing.

    Args:
        found: The difference.
        margin: Differences below it do not matter.
        p: p-value in place of the estimate's own, such as one that is adjusted.
        p_equal: The same for equality.
    """
    p, p_equal = found.p if p is None else p, found.p_equal if p_equal is None else p_equal
    if found.pairs > 1 and p is not None and p_equal is not None:
        is_inside = p_equal < 0.05
        if p < 0.05:
            return Verdict("better" if found.value > 0 else "worse", is_inside)
        if is_inside:
            return Verdict("equal", True)
    return Verdict("undecided", False, further_pairs(found, margin))


def further_pairs(found: Estimate, margin: float) -> int | None:
    """Return how many more pairs would decide, if the estimate and the variance between pairs stay as they are.

    U = max(B - C, 0) is the part of V that pairs do not change. With P' pairs the variance is V' = (V - U) P / P' + U,
    with df' = V'^2 / (((V - U) P / P')^2 / (P' - 1) + U^2 / df_U). The smallest P' is taken for which
    t(.975, df') sqrt(V') is below |estimate|, or below margin - |estimate|.
    """
    if found.se is None or found.pairs < 2:
        return None
    reach = max(abs(found.value), margin - abs(found.value))
    for pairs in range(found.pairs + 1, MAX_PAIRS + 1):
        of_pairs = found.of_pairs * found.pairs / pairs
        variance = of_pairs + found.of_units
        spread = of_pairs**2 / (pairs - 1) + found.of_units**2 / found.units
        df = max(1.0, variance**2 / spread) if spread else math.inf
        if t_quantile(0.975, df) * math.sqrt(variance) < reach:
            return pairs - found.pairs
    return None


def detectable(se: float, df: float) -> float:
    """Return the smallest true difference found with 80 % power: (t(.975) + t(.8)) SE."""
    return (t_quantile(0.975, df) + t_quantile(POWER, df)) * se


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(120)


def t_tail(t: float, df: float) -> float:
    """Return the chance that Student's t is above a value.

    With t = sqrt(df) tan(u) the density of u is proportional to cos(u)^(df-1), which a Gauss rule integrates.
    """
    if df > MANY:
        return NormalDist().cdf(-t)
    if t < 0:
        return 1 - t_tail(-t, df)
    start = math.atan(t / math.sqrt(df))
    end = min(math.pi / 2, start + 12 / math.sqrt(df)) if df > 60 else math.pi / 2  # beyond it the density is 0
    nodes = start + (end - start) * (_NODES + 1) / 2
    density = np.exp(_log_scale(df) + (df - 1) * np.log(np.maximum(np.cos(nodes), 1e-300)))
    return min(0.5, float((end - start) / 2 * (_WEIGHTS * density).sum()))


def t_quantile(chance: float, df: float) -> float:
    """Return the value that Student's t is below with a chance of at least 1/2.

    Newton's method in u, which cannot step over the solution: the distribution function is concave above 0.
    """
    normal = NormalDist().inv_cdf(chance)
    if df > MANY:
        return normal
    u = math.atan(normal / math.sqrt(df))
    for _ in range(60):
        step = t_tail(math.sqrt(df) * math.tan(u), df) - (1 - chance)
        step /= math.exp(_log_scale(df) + (df - 1) * math.log(math.cos(u)))
        u += step
        if abs(step) < 1e-14:
            break
    return math.sqrt(df) * math.tan(u)


def _log_scale(df: float) -> float:
    """Return the logarithm of the density of u at 0."""
    return math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)


def right(truth: Sequence[object], answers: Sequence[object]) -> Array:
    """Return 1 per row that is right, else 0: their mean is the accuracy."""
    return np.array([label == answer for label, answer in zip(truth, answers, strict=True)], dtype=np.float64)


def f1_shares(truth: Sequence[object], answers: Sequence[object]) -> Array:
    """Return what each row adds to the macro F1: the value plus the row's influence, whose mean over rows is 0.

    F1 = 2 H / S of a class, with hits H and S = labels + answers of that class; row i has influence
    n (2 h_i - F1 s_i) / S. Classes as in `metrics.f1_macro`.
    """
    classes = {name: number for number, name in enumerate(dict.fromkeys([*truth, *answers]))}
    y, g = np.array([classes[label] for label in truth]), np.array([classes[answer] for answer in answers])
    each = np.arange(len(classes))[:, None]
    labels, guesses = (y == each).astype(np.float64), (g == each).astype(np.float64)
    hits, sizes = labels * guesses, labels + guesses
    size = sizes.sum(axis=1, keepdims=True)
    f1 = 2 * hits.sum(axis=1, keepdims=True) / size
    shares: Array = (f1 + len(y) * (2 * hits - f1 * sizes) / size).mean(axis=0)
    return shares
