from math import comb, sqrt

import numpy as np
import pytest

from cl_dist.intervals import half_width, mean_interval, percentiles, resampled, wilson

Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution, from tables


def rows(right: int, wrong: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [right, wrong])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, "Two-sided confidence intervals for the single proportion",
        (15, 148, 0.0624, 0.1605),  # table I, method 3
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_examples(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(1, 2), (13, 14), (450, 800), (7, 1000)])
def test_a_wilson_limit_is_where_the_score_test_rejects(right: int, total: int) -> None:
    for limit in wilson(right, total):
        assert abs(right / total - limit) / sqrt(limit * (1 - limit) / total) == pytest.approx(Z)


def test_wilson_has_a_length_where_all_rows_are_right() -> None:
    assert wilson(14, 14) == pytest.approx((14 / (14 + Z**2), 1.0))
    assert wilson(0, 14) == pytest.approx((0.0, Z**2 / (14 + Z**2)))


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_counts_that_are_no_proportion(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"right={right}, rows={total}"):
        wilson(right, total)


def test_a_mean_over_tasks_has_the_normal_interval_where_tasks_are_large() -> None:
    tasks = [rows(800, 200), rows(300, 100), rows(1200, 300)]
    variance = sum(v.mean() * (1 - v.mean()) / v.size for v in tasks) / len(tasks) ** 2
    middle = np.mean([v.mean() for v in tasks])
    low, high = mean_interval(tasks)
    assert (low, high) == pytest.approx((middle - Z * sqrt(variance), middle + Z * sqrt(variance)), abs=1e-3)


def test_the_limits_of_two_small_tasks_are_the_quantiles_of_their_exact_bootstrap_distribution() -> None:
    def binomial(n: int, p: float) -> list[float]:
        return [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]

    one, two = binomial(13, 9 / 13), binomial(11, 5 / 11)
    chance = {(k, m): a * b for k, a in enumerate(one) for m, b in enumerate(two)}
    limits = mean_interval([rows(9, 4), rows(5, 6)])
    for quantile, limit in zip((0.025, 0.975), limits, strict=True):
        below = sum(p for (k, m), p in chance.items() if (k / 13 + m / 11) / 2 < limit - 1e-9)
        up_to = sum(p for (k, m), p in chance.items() if (k / 13 + m / 11) / 2 < limit + 1e-9)
        assert below - 0.005 < quantile < up_to + 0.005  # 0.005: three standard errors of a quantile of 10,000 draws


def test_one_task_of_right_and_wrong_rows_has_its_wilson_interval() -> None:
    assert mean_interval([rows(13, 1)]) == wilson(13, 14)


def test_tasks_without_a_wrong_row_still_have_an_interval() -> None:
    alone = wilson(14, 14)
    low, high = mean_interval([rows(14, 0)] * 4)
    assert high == 1.0
    assert 1 - low == pytest.approx((1 - alone[0]) / 2)  # four independent errors: 1/4 * sqrt(4)
    assert mean_interval([rows(14, 0), rows(10, 10)])[0] < mean_interval([rows(1400, 0), rows(10, 10)])[0]


def test_an_interval_is_the_same_in_every_call_and_order_of_rows() -> None:
    tasks = [rows(30, 12), rows(20, 5)]
    first = mean_interval(tasks)
    assert first == mean_interval([values[::-1] for values in tasks])
    assert first == pytest.approx(mean_interval(tasks, seed=1), abs=0.005)


def test_paired_differences_have_the_interval_of_their_mean() -> None:
    gained, lost, same = 12, 5, 83
    values = np.repeat([1.0, -1.0, 0.0], [gained, lost, same])
    error = values.std() / sqrt(values.size)
    low, high = mean_interval([values])
    assert (low, high) == pytest.approx((0.07 - Z * error, 0.07 + Z * error), abs=0.006)


def test_rows_that_all_agree_differ_by_nothing() -> None:
    assert mean_interval([np.zeros(20)] * 3, is_difference=True) == (0.0, 0.0)
    assert mean_interval([np.zeros(20)] * 3)[1] > 0.05  # three tasks without a right row


def test_row_scores_of_any_size_are_resampled_together() -> None:
    values = np.random.default_rng(0).random((40, 2))
    values[:, 1] = 1 - values[:, 0]
    (drawn,) = resampled([values], draws=2000)
    assert drawn.shape == (2000, 2)
    np.testing.assert_allclose(drawn.sum(1), 1.0)
    assert drawn[:, 0].std() == pytest.approx(values[:, 0].std() / sqrt(40), rel=0.06)
    loop = [np.random.default_rng(k).choice(values[:, 0], 40).mean() for k in range(2000)]  # rows drawn one by one
    assert percentiles(drawn[:, 0]) == pytest.approx(percentiles(np.array(loop)), abs=0.01)


def test_most_intervals_contain_the_true_mean() -> None:
    rng, truth, sizes = np.random.default_rng(7), (0.95, 0.8, 0.6), (20, 40, 60)
    found = [
        mean_interval([(rng.random(n) < p).astype(float) for n, p in zip(sizes, truth, strict=True)], draws=1000)
        for _ in range(600)
    ]
    share = np.mean([low <= np.mean(truth) <= high for low, high in found])
    assert 0.92 < share < 0.98


def test_tasks_without_rows_are_refused() -> None:
    for wrong in ([], [np.array([])], [np.ones((2, 2))]):
        with pytest.raises(ValueError, match="correct_by_task"):
            mean_interval(wrong)


def test_half_of_an_interval_stands_behind_the_sign() -> None:
    assert half_width((0.5, 0.75)) == 0.125
