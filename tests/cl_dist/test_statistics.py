"""Statistics of studies, on made-up results whose truth is known and against scipy and statsmodels."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from cl_dist import statistics
from cl_dist.metrics import f1_macro
from cl_dist.statistics import Array, Rows, Scope, Verdict, estimate, verdict

NORMAL = NormalDist()
LEVEL = 0.8
"""Latent accuracy of a row of average difficulty, in standard deviations: 76 % right."""


def made_up(
    generator: np.random.Generator,
    sizes: tuple[int, int, int],
    effect: float = 0.0,
    *,
    of_pairs: float = 0.02,
    of_tasks: float = 0.05,
    of_cells: float = 0.03,
    of_rows: float = 0.3,
) -> tuple[Rows, dict[Scope, float]]:
    """Return the paired differences of two arms, and the true difference for such tasks and for these tasks.

    A row is right where LEVEL + effect / 2 (minus for the second arm) + difficulty of the row + what the arm makes of
    the row + noise is above 0. The effect varies by pair, task and cell. `sizes` are pairs, tasks, rows of a task.
    """
    P, J, n = sizes
    tasks = generator.normal(0, of_tasks, J)
    shift = effect + tasks + generator.normal(0, of_pairs, (P, 1)) + generator.normal(0, of_cells, (P, J))
    rows = []
    for j in range(J):
        difficulty = generator.normal(0, 1, n)
        arms = [
            LEVEL + sign * shift[:, j : j + 1] / 2 + difficulty + generator.normal(0, of_rows, n) + noise > 0
            for sign, noise in zip((1, -1), generator.normal(0, 0.4, (2, P, n)), strict=True)
        ]
        rows.append(arms[0].astype(np.float64) - arms[1])
    within = 1 + of_rows**2 + 0.4**2 + (of_pairs**2 + of_cells**2) / 4

    def truth(shift: float, variance: float) -> float:
        up, down = ((LEVEL + sign * shift / 2) / math.sqrt(variance) for sign in (1, -1))
        return NORMAL.cdf(up) - NORMAL.cdf(down)

    fixed = sum(truth(effect + float(task), within) for task in tasks) / J
    return rows, {"sampled": truth(effect, within + of_tasks**2 / 4), "fixed": fixed}


REALISTIC = [(2, 5, 400), (2, 10, 100), (3, 10, 200), (5, 5, 100), (5, 10, 400), (10, 15, 100)]
"""Pairs, tasks, rows of a task."""


@pytest.mark.parametrize("sizes", REALISTIC, ids=str)
def test_the_interval_covers_the_truth_in_95_of_100_studies(sizes: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(sizes)
    covered: dict[Scope, int] = {"sampled": 0, "fixed": 0}
    for _ in range(500):
        rows, truth = made_up(generator, sizes, effect=0.1)
        for scope in covered:
            found = estimate(rows, scope)
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            covered[scope] += found.low <= truth[scope] <= found.high
    assert {scope: count / 500 for scope, count in covered.items()} == {
        "sampled": pytest.approx(0.95, abs=0.0301),
        "fixed": pytest.approx(0.95, abs=0.0301),
    }


def test_the_percentiles_of_the_bootstrap_are_too_narrow_with_few_pairs() -> None:
    """The reason for Student's t: with two pairs that differ, the bootstrap's interval misses the truth too often."""
    generator, missed = np.random.default_rng(0), 0
    for seed in range(200):
        rows, truth = made_up(generator, (2, 10, 100), of_pairs=0.2)
        low, high = statistics.bootstrap(rows, "sampled", draws=200, seed=seed)
        missed += not low <= truth["sampled"] <= high
    assert missed > 20


@pytest.mark.parametrize("sizes", [(2, 10, 200), (5, 10, 200), (10, 5, 100)], ids=str)
def test_equal_arms_are_called_different_in_at_most_5_of_100_studies(sizes: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(sizes)
    rejected = dict.fromkeys(("sampled", "fixed", "sign", "mcnemar"), 0)
    for _ in range(400):
        rows, _ = made_up(generator, sizes, of_pairs=0.0, of_tasks=0.0, of_cells=0.0)
        for scope in ("sampled", "fixed"):
            found = estimate(rows, scope)
            assert found is not None
            assert found.p is not None
            rejected[scope] += found.p < 0.05
        rejected["mcnemar"] += statistics.mcnemar(rows).p < 0.05
        alike, _ = made_up(generator, sizes, of_pairs=0.1, of_tasks=0.0, of_cells=0.0, of_rows=0.0)
        rejected["sign"] += statistics.sign_test(alike).p < 0.05  # covers these rows only
    bound = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 400)
    assert {name: count / 400 for name, count in rejected.items() if count / 400 > bound} == {}


def test_a_difference_of_the_detectable_size_is_found_in_about_80_of_100_studies() -> None:
    generator, sizes = np.random.default_rng(4), (5, 10, 200)
    effects = [estimate(made_up(generator, sizes)[0], "fixed") for _ in range(100)]
    size = float(np.mean([found.detectable for found in effects if found is not None]))
    shift = size / (made_up(generator, (1, 1, 2), 0.01, of_tasks=0.0)[1]["fixed"] / 0.01)
    hits = 0
    for _ in range(300):
        rows, _ = made_up(generator, sizes, shift, of_tasks=0.0)
        found = estimate(rows, "fixed")
        assert found is not None
        assert found.low is not None
        hits += found.low > 0
    assert 0.7 < hits / 300 < 0.9


def variance(rows: Rows, scope: Scope, what: str, draws: int = 3000) -> float:
    """Return the variance of the mean over draws of pairs or of units (rows or tasks), from the definition."""
    generator = np.random.default_rng(1)
    P, J = len(rows[0]), len(rows)
    means = []
    for _ in range(draws):
        pairs = generator.integers(P, size=P) if what == "pairs" else np.arange(P)
        if scope == "sampled":
            x = np.array([[part[p].mean() for part in rows] for p in pairs]) if what == "pairs" else cells(rows)
            if what == "units":
                x = x[:, generator.integers(J, size=J)]
            means.append(x.mean())
        else:
            drawn = [part[:, generator.integers(part.shape[1], size=part.shape[1])] for part in rows]
            means.append(np.mean([part[pairs].mean() for part in (drawn if what == "units" else rows)]))
    return float(np.var(means))


def cells(rows: Rows) -> Array:
    return np.stack([part.mean(axis=1) for part in rows], axis=1)


@pytest.mark.parametrize("scope", ["sampled", "fixed"])
def test_the_closed_forms_are_the_variances_of_the_bootstrap(scope: Scope) -> None:
    rows, _ = made_up(np.random.default_rng(3), (6, 8, 40), 0.3, of_pairs=0.5, of_tasks=0.8)
    P, J, n = 6, 8, 40
    w = np.full((P, J), 1 / (P * J))
    x = cells(rows)
    if scope == "sampled":
        A, B, _, _ = statistics._sampled(x, w, float(x.mean()))
    else:
        A, B, _, _ = statistics._fixed(rows, x, w)
    units = J if scope == "sampled" else n
    assert variance(rows, scope, "pairs") == pytest.approx(A * (P - 1) / P, rel=0.08)
    assert variance(rows, scope, "units") == pytest.approx(B * (units - 1) / units, rel=0.08)


def test_a_study_of_two_pairs_and_two_tasks_by_hand() -> None:
    """x = [[1, 2], [3, 8]]: mean 3.5, pair means 1.5 and 5.5, task means 2 and 5; interaction 1 in every cell.

    A = 8 / 2 = 4, B = 4.5 / 2 = 2.25, C = 4 / (1 * 1) / 4 = 1; V = 5.25; df = 27.5625 / (16 + 5.0625 + 1) = 1.2493.
    """
    rows = [np.array([[1.0, 1.0], [3.0, 3.0]]), np.array([[2.0, 2.0], [8.0, 8.0]])]
    found = estimate(rows)
    assert found is not None
    assert (found.value, found.se, found.df) == pytest.approx((3.5, math.sqrt(5.25), 1.24930), rel=1e-5)
    assert found.of_units == pytest.approx(1.25)
    assert found.of_pairs == pytest.approx(4.0)


def test_a_metric_that_leaves_out_a_task_of_each_pair() -> None:
    """Forgetting has no value for the task that a pair learns last: each pair is the mean of its other tasks."""
    nan = float("nan")
    rows = [np.array([[0.1, 0.3], [nan, nan]]), np.array([[0.4, 0.4], [0.0, 0.2]]), np.array([[nan, nan], [0.3, 0.3]])]
    for scope in ("sampled", "fixed"):
        found = estimate(rows, scope)
        assert found is not None
        assert found.value == pytest.approx(((0.2 + 0.4) / 2 + (0.1 + 0.3) / 2) / 2)
        assert found.se is not None
        assert found.se > 0
    assert statistics.sign_test(rows).wins == 2
    assert estimate([np.full((2, 3), nan)]) is None
    assert estimate([rows[0][:1], np.full((1, 2), nan)]) == estimate([rows[0][:1]], "fixed")  # one task is no sample


def test_one_pair_decides_nothing() -> None:
    rows, _ = made_up(np.random.default_rng(0), (1, 10, 400), 1.0)
    found = estimate(rows)
    assert found is not None
    assert found.p is not None
    assert found.p < 0.001
    assert verdict(found, 0.01).kind == "undecided"
    assert statistics.further_pairs(found, 0.01) is None


def of(value: float, spread: float, pairs: int = 10) -> statistics.Estimate:
    """Return the estimate of a value that differs between pairs alone."""
    noise = spread * np.random.default_rng(2).normal(size=(pairs, 1))
    x = value + (noise - noise.mean()).repeat(8, axis=1)
    found = estimate([x[:, j : j + 1].repeat(2, axis=1) for j in range(8)], margin=0.01)
    assert found is not None
    return found


def test_verdicts() -> None:
    assert verdict(of(0.05, 0.01), 0.01) == Verdict("better", False)
    assert verdict(of(-0.05, 0.01), 0.01) == Verdict("worse", False)
    assert verdict(of(0.0, 0.01), 0.01) == Verdict("equal", True)
    assert verdict(of(0.005, 0.005), 0.01) == Verdict("better", True)
    undecided = verdict(of(0.02, 0.05), 0.01)
    assert undecided.kind == "undecided"
    assert undecided.further_pairs is not None
    assert undecided.further_pairs > 10
    assert verdict(of(0.05, 0.01), 0.01, p=0.2, p_equal=1.0).kind == "undecided"


def test_further_pairs_fall_with_the_effect_and_are_none_where_rows_decide() -> None:
    numbers = [statistics.further_pairs(of(value, 0.1), 0.001) for value in (0.01, 0.03)]
    assert numbers[0] is not None
    assert numbers[1] is not None
    assert numbers[0] > numbers[1]
    tasks = np.random.default_rng(0).normal(0.001, 0.5, size=8)
    found = estimate([np.full((3, 4), value) + np.array([[0.0], [0.001], [-0.001]]) for value in tasks])
    assert found is not None
    assert statistics.further_pairs(found, 0.01) is None


@pytest.mark.parametrize(
    ("truth", "answers"), [("aabbc", "aabcc"), ("aaab", "bbba"), ("aab", "aab"), ("abcabcabcz", "abccbaabcy")]
)
def test_shares_of_macro_f1_have_it_as_their_mean(truth: str, answers: str) -> None:
    assert statistics.f1_shares(truth, answers).mean() == pytest.approx(f1_macro(truth, answers))


def test_shares_of_macro_f1_vary_as_the_bootstrap_of_its_rows() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(3, size=300)
    answers = np.where(generator.random(300) < 0.7, truth, generator.integers(3, size=300))
    shares = statistics.f1_shares(truth.tolist(), answers.tolist())
    drawn = [generator.integers(300, size=300) for _ in range(1500)]
    bootstrap = np.std([f1_macro(truth[rows].tolist(), answers[rows].tolist()) for rows in drawn])
    assert shares.std() / math.sqrt(300) == pytest.approx(bootstrap, rel=0.08)


@pytest.mark.parametrize(
    ("chance", "df", "value"),
    [(0.975, 1, 12.7062047), (0.975, 4, 2.7764451), (0.8, 9, 0.8834039), (0.975, 100, 1.9839715)],
)
def test_quantiles_of_students_t(chance: float, df: float, value: float) -> None:
    """From a table of Student's t."""
    assert statistics.t_quantile(chance, df) == pytest.approx(value, rel=1e-7)


def test_the_bootstrap_leaves_tasks_out_that_a_metric_does_not_cover() -> None:
    first, second = np.full((1, 4), 0.25), np.full((1, 4), np.nan)
    assert statistics.bootstrap([first, second]) == (0.25, 0.25)


def test_the_bootstrap_of_many_rows_draws_them_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = made_up(np.random.default_rng(5), (3, 2, 50))
    whole = statistics.bootstrap(rows, "fixed", draws=50)
    monkeypatch.setattr(statistics, "_CELLS", 200)
    assert statistics.bootstrap(rows, "fixed", draws=50) == pytest.approx(whole, abs=1e-12)


def test_the_percentile_interval_approaches_the_interval_of_many_pairs() -> None:
    rows, _ = made_up(np.random.default_rng(5), (40, 40, 30), of_pairs=0.5, of_tasks=0.5, of_cells=0.0)
    found = estimate(rows)
    assert found is not None
    assert found.se is not None
    low, high = statistics.bootstrap(rows)
    assert (high - low) / (3.92 * found.se) == pytest.approx(1, abs=0.12)


class TestAgainstScipyAndStatsmodels:
    def test_student(self) -> None:
        stats: Any = pytest.importorskip("scipy.stats")
        for df in (1, 1.25, 2.5, 7, 59, 61, 1e3, 9e4):
            for chance in (0.5, 0.8, 0.975, 0.9999):
                assert statistics.t_quantile(chance, df) == pytest.approx(stats.t.ppf(chance, df), rel=1e-6, abs=1e-9)
            for t in (-3.0, 0.0, 0.5, 4.0, 30.0):
                assert statistics.t_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-6, abs=1e-14)

    @pytest.mark.parametrize("counts", [(0, 5), (3, 3), (2, 9), (40, 71), (900, 1100), (0, 0)])
    def test_exact_tests(self, counts: tuple[int, int]) -> None:
        stats: Any = pytest.importorskip("scipy.stats")
        contingency: Any = pytest.importorskip("statsmodels.stats.contingency_tables")
        row = np.array([[1.0] * counts[0] + [-1.0] * counts[1] + [0.0] * 7])
        found = statistics.mcnemar([row])
        assert (found.wins, found.losses) == counts
        if sum(counts):
            assert found.p == pytest.approx(stats.binomtest(counts[0], sum(counts)).pvalue)
            table = [[5, counts[0]], [counts[1], 2]]
            assert found.p == pytest.approx(contingency.mcnemar(table, exact=True).pvalue)
        assert statistics.sign_test([row.T]).p == pytest.approx(found.p)

    @pytest.mark.parametrize("values", [(0.01, 0.04, 0.03, 0.5), (0.2,), (0.02, 0.02, 0.9)])
    def test_holm(self, values: Sequence[float]) -> None:
        multitest: Any = pytest.importorskip("statsmodels.stats.multitest")
        expected = multitest.multipletests(values, method="holm")[1]
        assert list(statistics.holm({str(k): p for k, p in enumerate(values)}).values()) == pytest.approx(expected)

    def test_one_task_and_one_pair_are_the_t_test_of_paired_rows(self) -> None:
        stats: Any = pytest.importorskip("scipy.stats")
        rows, _ = made_up(np.random.default_rng(0), (1, 1, 60), 0.5)
        found = estimate(rows, "fixed")
        expected = stats.ttest_1samp(rows[0][0], 0)
        assert found is not None
        assert (found.p, found.df) == pytest.approx((expected.pvalue, 59))

    def test_pairs_that_differ_much_are_the_t_test_of_their_means(self) -> None:
        stats: Any = pytest.importorskip("scipy.stats")
        means = np.array([0.1, 0.4, -0.2, 0.3])
        found = estimate([means[:, None].repeat(3, axis=1) for _ in range(4)])
        expected = stats.ttest_1samp(means, 0)
        assert found is not None
        assert (found.p, found.df) == pytest.approx((expected.pvalue, 3))
