import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.metrics import FORMULAS, accuracy, f1_macro, majority_accuracy, summarize

NAN = math.nan
A = [[0.9, NAN, NAN], [0.95, 0.8, NAN], [0.7, 0.6, 0.75]]
F1 = [[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.6, 0.5, 0.7]]


def value(metrics: dict[str, dict[str, Any]], name: str) -> Any:
    return metrics[name]["value"]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("cl/avg_acc", (0.7 + 0.6 + 0.75) / 3),
        ("cl/avg_inc_acc", (0.9 + (0.95 + 0.8) / 2 + (0.7 + 0.6 + 0.75) / 3) / 3),
        ("cl/bwt", ((0.7 - 0.9) + (0.6 - 0.8)) / 2),
        ("cl/forgetting_max", ((0.95 - 0.7) + (0.8 - 0.6)) / 2),
        ("cl/forgetting_first", ((0.9 - 0.7) + (0.8 - 0.6)) / 2),
        ("cl/learning_acc", (0.9 + 0.8 + 0.75) / 3),
        ("cl/f1_macro", (0.6 + 0.5 + 0.7) / 3),
        ("cl/fwt_one", ((0.9 - 0.85) + (0.8 - 0.8) + (0.75 - 0.7)) / 3),
        ("cl/intransigence", ((0.92 - 0.9) + (0.9 - 0.8) + (0.85 - 0.75)) / 3),
    ],
)
def test_each_metric_of_a_three_task_matrix_is_that_of_hand_arithmetic(name: str, by_hand: float) -> None:
    metrics = summarize(A, F1, individual=[0.85, 0.8, 0.7], joint=[0.92, 0.9, 0.85])
    assert value(metrics, name) == pytest.approx(by_hand)
    assert metrics[name]["formula"] == FORMULAS[name]


def test_forward_transfer_needs_the_cells_before_learning() -> None:
    tried = [[0.9, 0.55, NAN], [0.95, 0.8, 0.5], [0.7, 0.6, 0.75]]
    assert "cl/fwt" not in summarize(A, F1, before=[0.5, 0.5, 0.4])
    assert "cl/fwt" not in summarize(tried, F1)
    metrics = summarize(tried, F1, before=[0.5, 0.5, 0.4])
    assert value(metrics, "cl/fwt") == pytest.approx(((0.55 - 0.5) + (0.5 - 0.4)) / 2)


def test_a_score_taken_before_learning_changes_no_other_metric() -> None:
    tried = [[0.9, 0.99, NAN], [0.95, 0.8, 0.99], [0.7, 0.6, 0.75]]
    assert summarize(tried, F1) == summarize(A, F1)


def test_missing_cells_give_none_and_never_zero() -> None:
    a: list[list[float | None]] = [[0.9, None, None], [None, 0.8, None], [0.7, 0.6, 0.75]]
    metrics = summarize(a, np.full((3, 3), NAN))
    assert value(metrics, "cl/bwt") == pytest.approx(-0.2)
    for name in ("cl/avg_inc_acc", "cl/forgetting_max", "cl/f1_macro", "cl/fwt_one", "cl/intransigence"):
        assert value(metrics, name) is None
    assert "cl/fwt" not in metrics


def test_joint_run_has_a_final_row_only() -> None:
    metrics = summarize([[NAN, NAN], [0.9, 0.8]], [[NAN, NAN], [0.9, 0.8]])
    assert value(metrics, "cl/avg_acc") == pytest.approx(0.85)
    assert {name for name in metrics if value(metrics, name) is not None} == {"cl/avg_acc", "cl/f1_macro"}


@pytest.mark.parametrize("rows", [2, 3], ids=["rows not reached are absent", "rows not reached are nan"])
def test_an_unfinished_sequence_is_judged_over_the_tasks_it_has_learned(rows: int) -> None:
    a = [*A[:2], [NAN] * 3][:rows]
    f1 = [*F1[:2], [NAN] * 3][:rows]
    smaller = summarize([row[:2] for row in A[:2]], [row[:2] for row in F1[:2]], individual=[0.85, 0.8])
    assert summarize(a, f1, individual=[0.85, 0.8, 0.7]) == smaller


def test_one_task_has_no_backward_transfer_and_no_forgetting() -> None:
    metrics = summarize([[0.9]], [[0.8]])
    assert value(metrics, "cl/avg_acc") == value(metrics, "cl/learning_acc") == 0.9
    for name in ("cl/bwt", "cl/forgetting_max", "cl/forgetting_first"):
        assert value(metrics, name) is None


@pytest.mark.parametrize("empty", [[], [[]], [[NAN, NAN], [NAN, NAN]]])
def test_nothing_measured_gives_none_everywhere(empty: list[list[float]]) -> None:
    assert {metric["value"] for metric in summarize(empty, empty).values()} == {None}


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"accuracy has shape \(3, 2\)"):
        summarize(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"f1 has shape \(2, 2\)"):
        summarize(A, np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"individual has shape \(2,\)"):
        summarize(A, F1, individual=[0.5, 0.5])


@st.composite
def lower_matrices(draw: st.DrawFn, least: int = 2) -> np.ndarray:
    num_tasks = draw(st.integers(least, 6))
    scores = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 3))
    rows = [draw(st.lists(scores, min_size=num_tasks, max_size=num_tasks)) for _ in range(num_tasks)]
    return np.where(np.tri(num_tasks, dtype=bool), np.array(rows), NAN)


@settings(max_examples=60, deadline=None)
@given(lower_matrices())
def test_forgetting_is_minus_backward_transfer_and_at_most_that_from_the_peak(a: np.ndarray) -> None:
    metrics = summarize(a, a)
    forgetting = value(metrics, "cl/forgetting_first")
    assert forgetting == pytest.approx(-value(metrics, "cl/bwt"))
    assert value(metrics, "cl/forgetting_max") >= forgetting - 1e-12
    assert value(metrics, "cl/f1_macro") == value(metrics, "cl/avg_acc")


@settings(max_examples=60, deadline=None)
@given(lower_matrices())
def test_average_is_learning_accuracy_plus_its_share_of_backward_transfer(a: np.ndarray) -> None:
    metrics, T = summarize(a, a), len(a)
    change = (T - 1) / T * value(metrics, "cl/bwt")
    assert value(metrics, "cl/avg_acc") == pytest.approx(value(metrics, "cl/learning_acc") + change)


@settings(max_examples=60, deadline=None)
@given(lower_matrices(), st.randoms(use_true_random=False))
def test_the_order_of_an_old_tasks_scores_between_first_and_last_does_not_matter(a: np.ndarray, random: Random) -> None:
    shuffled = a.copy()
    for j in range(len(a) - 2):
        between = list(a[j + 1 : -1, j])
        random.shuffle(between)
        shuffled[j + 1 : -1, j] = between
    old, new = summarize(a, a), summarize(shuffled, shuffled)
    for name in old.keys() - {"cl/avg_inc_acc"}:
        assert old[name] == new[name]


@settings(max_examples=60, deadline=None)
@given(lower_matrices(), st.floats(-0.5, 0.5))
def test_a_constant_added_to_every_score_moves_averages_and_leaves_differences(a: np.ndarray, shift: float) -> None:
    old, new = summarize(a, a), summarize(a + shift, a)
    for name in ("cl/avg_acc", "cl/avg_inc_acc", "cl/learning_acc"):
        assert value(new, name) == pytest.approx(value(old, name) + shift)
    for name in ("cl/bwt", "cl/forgetting_max", "cl/forgetting_first"):
        assert value(new, name) == pytest.approx(value(old, name), abs=1e-9)


def slow_f1_macro(labels: Sequence[str], predictions: Sequence[str]) -> float:
    scores = []
    for name in sorted({*labels, *predictions}):
        tp = sum(y == name and p == name for y, p in zip(labels, predictions, strict=True))
        fp = sum(y != name and p == name for y, p in zip(labels, predictions, strict=True))
        fn = sum(y == name and p != name for y, p in zip(labels, predictions, strict=True))
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=30))
def test_f1_macro_is_that_of_precision_and_recall_counted_slowly(pairs: list[tuple[str, str]]) -> None:
    labels, predictions = zip(*pairs, strict=True)
    assert f1_macro(labels, predictions) == pytest.approx(slow_f1_macro(labels, predictions))


def test_f1_macro_counts_a_class_that_is_only_predicted_and_skips_one_that_is_in_neither() -> None:
    # Hand arithmetic: neg tp=1 fn=1 -> 2/3, pos tp=1 -> 1, neutral only predicted -> 0; a fourth never occurs.
    assert f1_macro(["neg", "neg", "pos"], ["neg", "neutral", "pos"]) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_accuracy_counts_equal_pairs() -> None:
    assert accuracy([0, 1, 1, 0], [0, 1, 0, 0]) == 0.75
    with pytest.raises(ValueError, match=r"2 labels, 1 predictions"):
        accuracy([0, 1], [0])
    with pytest.raises(ValueError, match=r"0 labels"):
        f1_macro([], [])


def test_majority_is_that_of_the_train_labels() -> None:
    assert majority_accuracy(["pos", "pos", "neg"], ["neg", "neg", "pos", "neg"]) == 0.25
    assert majority_accuracy(["pos", "neg"], ["neg", "neg", "pos"]) == pytest.approx(2 / 3), "a tie goes to 'neg'"
    with pytest.raises(ValueError, match="train_labels is empty"):
        majority_accuracy([], ["pos"])
