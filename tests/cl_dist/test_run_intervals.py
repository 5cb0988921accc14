import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cl_dist.config import parse
from cl_dist.data.tasks import TaskConfig
from cl_dist.intervals import mean_interval, wilson
from cl_dist.metrics import f1_macro, summarize
from cl_dist.run_intervals import f1_interval, metric_intervals, row_scores, score_interval, with_intervals

Cells = list[list[Any]]
SIZES = (60, 40, 80, 50)


def scores(seed: int = 0, forgets: float = 0.2) -> Cells:
    """Row scores of four tasks: of each later task a part of the right rows turns wrong, and some turn right."""
    rng = np.random.default_rng(seed)
    cells: Cells = [[None] * len(SIZES) for _ in SIZES]
    for j, size in enumerate(SIZES):
        right = rng.random(size) < 0.8
        for t in range(j, len(SIZES)):
            cells[t][j] = right.astype(float)
            right = np.where(right, rng.random(size) > forgets, rng.random(size) < forgets / 2)
    return cells


def matrix(cells: Cells) -> list[list[float | None]]:
    return [[None if x is None else float(x.mean()) for x in row] for row in cells]


def values(cells: Cells) -> dict[str, float]:
    found = summarize(matrix(cells), matrix(cells))
    return {name: metric["value"] for name, metric in found.items()}


def redrawn(cells: Cells, rng: random.Random) -> Cells:
    """Draw rows within tasks with replacement, one by one: the same rows in all cells of a task."""
    picks = [[rng.randrange(size) for _ in range(size)] for size in SIZES]
    return [[None if x is None else x[picks[j]] for j, x in enumerate(row)] for row in cells]


def test_intervals_are_those_of_a_bootstrap_of_the_whole_summary() -> None:
    cells, rng = scores(), random.Random(0)
    found, draws = metric_intervals(cells), [values(redrawn(cells, rng)) for _ in range(600)]
    assert set(found) == {
        "cl/avg_acc",
        "cl/avg_inc_acc",
        "cl/bwt",
        "cl/forgetting_first",
        "cl/forgetting_max",
        "cl/learning_acc",
    }
    for name, interval in found.items():
        slow = np.quantile([draw[name] for draw in draws], [0.025, 0.975])
        assert interval == pytest.approx(tuple(slow), abs=0.02), name
        assert interval is not None
        assert interval[0] <= values(cells)[name] <= interval[1]


def test_backward_transfer_and_forgetting_have_mirrored_intervals() -> None:
    found = metric_intervals(scores())
    low, high = found["cl/bwt"] or (0, 0)
    assert found["cl/forgetting_first"] == pytest.approx((-high, -low), abs=0.004)


def test_predictions_that_never_change_have_forgotten_nothing() -> None:
    found = metric_intervals(scores(forgets=0.0))
    assert found["cl/bwt"] == found["cl/forgetting_max"] == found["cl/forgetting_first"] == (0.0, 0.0)


def test_a_metric_with_an_unmeasured_cell_has_no_interval() -> None:
    cells = scores()
    cells[2][0] = None
    found = metric_intervals(cells)
    assert found["cl/forgetting_max"] is found["cl/avg_inc_acc"] is None
    assert found["cl/avg_acc"] == mean_interval(cells[-1])
    joint: Cells = [[None] * 4, [None] * 4, [None] * 4, scores()[-1]]
    assert metric_intervals(joint)["cl/avg_acc"] == mean_interval(joint[-1])
    assert metric_intervals([[None] * 4] * 4)["cl/avg_acc"] is None


def test_an_unfinished_sequence_has_the_intervals_of_its_tasks() -> None:
    cells = [*scores()[:2], [None] * 4, [None] * 4]
    assert metric_intervals(cells)["cl/avg_acc"] == mean_interval(cells[1][:2])
    assert metric_intervals(cells[:1])["cl/bwt"] is None


def test_macro_f1_has_the_interval_of_a_bootstrap_row_by_row() -> None:
    rng = random.Random(1)
    tasks = []
    for size in (80, 50):
        labels = [rng.choice("aabc") for _ in range(size)]
        tasks.append([(label, label if rng.random() < 0.7 else rng.choice("abc")) for label in labels])

    def mean_f1(answers: list[list[tuple[str, str]]]) -> float:
        return float(np.mean([f1_macro(*zip(*pairs, strict=True)) for pairs in answers]))

    drawn = [mean_f1([rng.choices(pairs, k=len(pairs)) for pairs in tasks]) for _ in range(600)]
    found = f1_interval(tasks)
    assert found == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert found is not None
    assert found[0] < mean_f1(tasks) < found[1]
    assert f1_interval([]) is None


def task_of(**settings: Any) -> TaskConfig:
    return parse(TaskConfig, {"id": "a", "source": {"kind": "jsonl", "path": "a.jsonl"}, **settings})


def test_a_score_that_is_no_mean_over_rows_has_no_interval() -> None:
    answers = [("the cat", "cat"), ("dog", "cat"), ("a: b", "a: b")]
    assert score_interval(task_of(), answers) == wilson(1, 3)
    exact = row_scores(task_of(output="text", metric="exact_match"), answers)
    assert exact is not None
    assert exact.tolist() == [1.0, 0.0, 1.0]
    for metric in ("bleu", "joint_state", "rouge_l"):
        assert score_interval(task_of(output="text", metric=metric), answers) is None


def test_metrics_without_an_interval_say_so() -> None:
    metrics: dict[str, dict[str, Any]] = {
        "cl/bwt": {"value": 0.5, "formula": ""},
        "cl/fwt_one": {"value": None, "formula": ""},
    }
    found = with_intervals(metrics, {"cl/bwt": [0.4, 0.6]})
    assert found["cl/bwt"] == {"value": 0.5, "formula": "", "interval": [0.4, 0.6]}
    assert found["cl/fwt_one"]["interval"] is None


def test_more_rows_narrow_an_interval() -> None:
    widths = []
    for copies in (1, 4, 16):
        many = [[None if x is None else np.tile(x, copies) for x in row] for row in scores()]
        low, high = metric_intervals(many)["cl/avg_acc"] or (0, 0)
        widths.append(high - low)
    assert all(wide / narrow == pytest.approx(2, rel=0.1) for wide, narrow in pairwise(widths))
