"""95 % intervals of a run's scores, from its stored predictions: cells of the accuracy matrix, and metrics.

Axes: N test rows of a task, T tasks, D bootstrap draws, K labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cl_dist.data.tasks import TaskConfig
from cl_dist.data.text_metrics import ROW_METRICS
from cl_dist.intervals import LEVEL, Array, Interval, mean_interval, percentiles, resampled
from cl_dist.ledger import Ledger
from cl_dist.run import Run
from cl_dist.stage import Evaluate, ref

Answers = list[tuple[str, str]]
"""(label, prediction) of each test row, in order."""
Cells = list[list[Interval | None]]
DRAWS = 2_000
"""Bootstrap draws of statistics that are not means over rows; their interval's ends vary by 6 % of a standard error."""


def score_interval(task: TaskConfig, answers: Answers) -> Interval | None:
    """Return the interval of a task's score: Wilson's for labels; None where it is not a mean over rows."""
    x_N = row_scores(task, answers)
    return None if x_N is None else mean_interval([x_N])


def run_intervals(run: Run) -> dict[str, Any]:
    """Return the intervals of a run: {"level", "accuracy": cells as in the matrix, "metrics": by name}.

    A cell of a task with labels has its Wilson interval. Others come from a bootstrap over rows within tasks, see
    `metric_intervals`. None where a score was not measured, where it is not a mean over rows (joint_state, rouge_l,
    bleu), or where predictions are missing.
    """
    answers = _answers(run)
    tasks = run.tasks.tasks
    cells: Cells = [
        [None if cell is None else score_interval(tasks[u], cell) for u, cell in enumerate(row)] for row in answers
    ]
    found = metric_intervals([[row_scores(tasks[u], cell) for u, cell in enumerate(row)] for row in answers])
    if all(task.output == "label" for task in tasks):
        found["cl/f1_macro"] = f1_interval(_known_classes(run, _last(answers)))
    plain = {name: None if interval is None else list(interval) for name, interval in found.items()}
    return {
        "level": LEVEL,
        "accuracy": [[None if cell is None else list(cell) for cell in row] for row in cells],
        "metrics": plain,
    }


def row_scores(task: TaskConfig, answers: Answers | None) -> Array | None:
    """Return the score of each row, whose mean is the task's score; None if there is none."""
    score = (lambda label, answer: label == answer) if task.output == "label" else ROW_METRICS.get(task.metric)
    if answers is None or score is None:
        return None
    return np.array([float(score(label, answer)) for label, answer in answers])


def metric_intervals(scores: Sequence[Sequence[Array | None]]) -> dict[str, Interval | None]:
    """Return the intervals of the metrics of `cl_dist.metrics`, given the row scores of every cell of the matrix.

    A row of a task enters with all its scores, those after each later task too, so differences are paired. A metric
    that is a mean over tasks of means over rows has the interval of `cl_dist.intervals.mean_interval`, that of

        cl/avg_acc           x[T,j]               over all j
        cl/learning_acc      x[j,j]               over all j
        cl/avg_inc_acc       sum_{t>=j} x[t,j]/t  over all j
        cl/bwt               x[T,j] - x[j,j]      over j < T
        cl/forgetting_first  x[j,j] - x[T,j]      over j < T

    x being 1 for a right row. cl/forgetting_max has the percentiles of the metric over bootstrap draws of rows,
    extended to its value where the maximum of a draw shifts them past it.
    """
    T = max((t + 1 for t, row in enumerate(scores) if any(x is not None for x in row)), default=0)
    tasks: list[Array | None] = []  # of each task (N, T - j): the scores of its rows after it was learned
    for j in range(T):
        columns = [x for t in range(j, T) if (x := scores[t][j]) is not None]
        tasks.append(np.stack(columns, axis=1) if len(columns) == T - j else None)
    old = tasks[: max(T - 1, 0)]
    found = {
        "cl/avg_acc": _mean([None if x is None else x[:, -1] for x in tasks]),
        "cl/avg_inc_acc": _mean(
            [None if x is None else x @ (1.0 / np.arange(j + 1, T + 1)) for j, x in enumerate(tasks)]
        ),
        "cl/bwt": _mean([None if x is None else x[:, -1] - x[:, 0] for x in old], is_difference=True),
        "cl/forgetting_first": _mean([None if x is None else x[:, 0] - x[:, -1] for x in old], is_difference=True),
        "cl/forgetting_max": _forgetting_max(old),
        "cl/learning_acc": _mean([None if x is None else x[:, 0] for x in tasks]),
    }
    last = [x for row in scores[T - 1 : T] for x in row[:T]]
    if any(x is None for x in tasks) and all(x is not None for x in last):  # a joint run has the last row only
        found["cl/avg_acc"] = _mean(last)
    return found


def f1_interval(tasks: Sequence[Answers]) -> Interval | None:
    """Return the percentile interval of the mean over tasks of macro F1.

        F1_d = mean over the K labels that a draw has, or predicts, of 2 tp_k / (labels_k + predictions_k)

    over D draws of rows within tasks; extended to the value on the rows themselves.
    """
    if not tasks:
        return None
    values = [_indicators(answers) for answers in tasks]
    drawn_D = np.mean([_f1(means) for means in resampled(values, DRAWS)], axis=0)
    return _containing(percentiles(drawn_D), float(np.mean([_f1(v.mean(0)[None])[0] for v in values])))


def with_intervals(metrics: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return metrics, each with its "interval": [low, high] or None."""
    return {name: {**metric, "interval": found.get(name)} for name, metric in metrics.items()}


def _answers(run: Run) -> list[list[Answers | None]]:
    """Return the answers that the cells of the matrix are computed from; None where there are none."""
    rows: list[list[Answers | None]] = []
    for t in range(len(run.tasks)):
        row: list[Answers | None] = [None] * len(run.tasks)
        for stage in run.plan(t):
            if isinstance(stage, Evaluate) and run.ledger.manifest(ref(stage)) is not None:
                if stage.previous is not None:
                    row = list(rows[stage.previous.task])
                for task in stage.tasks:
                    row[task] = _read(run.ledger, stage, run.tasks.tasks[task].id)
        rows.append(row)
    return rows


def _read(ledger: Ledger, stage: Evaluate, task: str) -> Answers | None:
    name = f"predictions/{task}.jsonl"
    if not (ledger.path(ref(stage)) / name).exists():
        return None
    return [(line["label"], line["prediction"]) for line in ledger.read_lines(ref(stage), name)]


def _last(answers: Sequence[Sequence[Answers | None]]) -> Sequence[Answers | None]:
    """Return the answers to the tasks learned so far, by the last model."""
    learned = [t for t, row in enumerate(answers) if any(cell is not None for cell in row)]
    return answers[learned[-1]][: learned[-1] + 1] if learned else ()


def _known_classes(run: Run, row: Sequence[Answers | None]) -> list[Answers]:
    """Return the answers of the tasks of a row; answers that are no label are one class, as in the score."""
    known = {u: set(run.data(u).labels) for u, cell in enumerate(row) if cell is not None}
    return [
        [(label, answer if answer in known[u] else "") for label, answer in cell]
        for u, cell in enumerate(row)
        if cell is not None
    ]


def _mean(tasks: Sequence[Array | None], *, is_difference: bool = False) -> Interval | None:
    known = [x for x in tasks if x is not None]
    return mean_interval(known, is_difference=is_difference) if known and len(known) == len(tasks) else None


def _forgetting_max(old: Sequence[Array | None]) -> Interval | None:
    known = [x for x in old if x is not None]
    if not known or len(known) < len(old):
        return None

    def forgotten(means: Array) -> Array:
        return means[:, :-1].max(axis=1) - means[:, -1]

    drawn_D = np.mean([forgotten(means) for means in resampled(known, DRAWS)], axis=0)
    return _containing(percentiles(drawn_D), float(np.mean([forgotten(x.mean(0)[None])[0] for x in known])))


def _containing(interval: Interval, value: float) -> Interval:
    return min(interval[0], value), max(interval[1], value)


def _indicators(answers: Answers) -> Array:
    """Return, per row, K columns of hits and K of occurrences as label and as prediction: (N, 2 K)."""
    classes = sorted({name for pair in answers for name in pair})
    number = {name: k for k, name in enumerate(classes)}
    values = np.zeros((len(answers), 2 * len(classes)))
    for n, (label, answer) in enumerate(answers):
        values[n, number[label]] = label == answer
        values[n, len(classes) + number[label]] += 1
        values[n, len(classes) + number[answer]] += 1
    return values


def _f1(means: Array) -> Array:
    """Return macro F1 of draws, (D, 2 K) -> (D,)."""
    hits_DK, sizes_DK = np.split(means, 2, axis=1)
    ratio_DK = np.divide(2 * hits_DK, sizes_DK, out=np.zeros_like(hits_DK), where=sizes_DK > 0)
    return ratio_DK.sum(axis=1) / (sizes_DK > 0).sum(axis=1)
