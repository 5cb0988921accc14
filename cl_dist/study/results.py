"""Results of a study: rows of finished runs, means of arms, comparisons and their verdicts, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cl_dist import statistics
from cl_dist.errors import DataError
from cl_dist.run import Run
from cl_dist.stage import Evaluate, StageRef, ref
from cl_dist.statistics import Array, Estimate, Rows, Verdict
from cl_dist.study.file import Comparison, Metric, Pair, Study, StudyRun
from cl_dist.study.registration import Registration

SCHEMA_VERSION = 1
NAMES: Mapping[Metric, str] = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "forgetting": "forgetting",
    "transfer": "transfer",
}
KEYS: Mapping[Metric, str] = {
    "accuracy": "cl/avg_acc",
    "f1": "cl/f1_macro",
    "forgetting": "cl/forgetting_max",
    "transfer": "cl/fwt_one",
}
"""Metric of summary.json that a run's mean over tasks equals."""
LOWER_IS_BETTER = ("forgetting",)
Answers = list[tuple[str, str, str]]
"""(id, label, prediction) of each test row."""


@dataclass(frozen=True)
class Scored:
    """The answers of a finished run to the test rows of each task, over the sequence."""

    answers: Mapping[str, Sequence[Answers]]
    """By task: the distinct answers from when it was learned to the last task; the last ones are final."""
    learned: Mapping[str, Answers | None]
    """Answers right after a task was learned; None where they were not scored."""
    last: str
    """The task that was learned last."""
    labels: Mapping[str, frozenset[str]]
    seconds: float


def scored(run: Run) -> Scored:
    """Read the answers of a finished run.

    Raises:
        CheckpointError: If they are damaged.
    """
    read: dict[tuple[StageRef, int], Answers] = {}
    history: list[dict[int, StageRef]] = []
    seconds = 0.0
    for t in range(len(run.tasks)):
        row: dict[int, StageRef] = {}
        for stage in run.plan(t):
            manifest = run.ledger.manifest(ref(stage))
            seconds += 0.0 if manifest is None else manifest["seconds"]
            if isinstance(stage, Evaluate) and manifest is not None:
                if stage.previous is not None:
                    row = dict(history[stage.previous.task])
                row |= dict.fromkeys(stage.tasks, ref(stage))
        history.append(row)

    def answers(u: int, where: StageRef) -> Answers:
        if (where, u) not in read:
            found = run.ledger.read_lines(where, f"predictions/{run.tasks.tasks[u].id}.jsonl")
            read[where, u] = [(each["id"], each["label"], each["prediction"]) for each in found]
        return read[where, u]

    ids = [task.id for task in run.tasks.tasks]
    seen = {u: dict.fromkeys(row[u] for row in history[u:] if u in row) for u in range(len(ids))}
    return Scored(
        answers={ids[u]: [answers(u, where) for where in stages] for u, stages in seen.items()},
        learned={ids[u]: answers(u, history[u][u]) if u in history[u] else None for u in range(len(ids))},
        last=ids[-1],
        labels={ids[u]: frozenset(run.data(u).labels) for u in range(len(ids))},
        seconds=seconds,
    )


def metric_rows(run: Scored, task: str, metric: Metric | Literal["learned"], alone: Scored | None) -> Array | None:
    """Return what each test row of a task adds to a metric of a run; None where the metric does not cover the task.

    The mean over rows is the task's part of the metric in summary.json.
    """
    final = run.answers[task][-1]
    if metric == "accuracy":
        return _right(final)
    if metric == "f1":
        known = run.labels[task]
        return statistics.f1_shares([y for _, y, _ in final], [g if g in known else "" for _, _, g in final])
    learned = run.learned[task]
    if learned is None or (metric == "forgetting" and task == run.last):
        return None
    if metric == "learned":
        return _right(learned)
    if metric == "forgetting":
        earlier = run.answers[task][:-1] or [final]
        return max((_right(each) for each in earlier), key=lambda rows: float(rows.mean())) - _right(final)
    own = None if alone is None else alone.learned[task]
    return None if own is None else _right(learned) - _right(own)


def _right(answers: Answers) -> Array:
    return statistics.right([label for _, label, _ in answers], [guess for _, _, guess in answers])


class Results:
    """The finished runs of a study."""

    def __init__(self, study: Study, runs: Mapping[str, Run], done: Sequence[StudyRun]) -> None:
        self._study = study
        self.done = list(done)
        self._scored = {(each.arm, each.pair): scored(runs[each.name]) for each in done}
        self._check_rows()

    def _check_rows(self) -> None:
        """Check that all runs score the same test rows.

        Raises:
            DataError: If they do not.
        """
        for task in self._study.tasks:
            first: list[tuple[str, str]] | None = None
            for (arm, pair), run in self._scored.items():
                rows = [(name, label) for name, label, _ in run.answers[task][-1]]
                first = first or rows
                if rows != first:
                    raise DataError(f"{arm}-{pair.name}: task {task} has other test rows than in the other runs")

    def pairs(self, *arms: str) -> list[Pair]:
        """Return the pairs that all of some arms have finished."""
        return [pair for pair in self._study.pairs if all((arm, pair) in self._scored for arm in arms)]

    def seconds(self, arm: str) -> float | None:
        """Return the mean seconds of an arm's runs, with the stages that they share with other runs."""
        found = [self._scored[arm, pair].seconds for pair in self.pairs(arm)]
        return sum(found) / len(found) if found else None

    def num_rows(self) -> dict[str, int]:
        """Return the number of test rows by task; empty before the first run is finished."""
        first = next(iter(self._scored.values()), None)
        return {} if first is None else {task: len(first.answers[task][-1]) for task in self._study.tasks}

    def rows(
        self, arm: str, metric: Metric | Literal["learned"], pairs: Sequence[Pair], *, is_difference: bool = False
    ) -> Rows | None:
        """Return one array (pairs, rows) per task; None if the metric was not measured.

        In a difference of two arms the models of their own cancel, so transfer does not need them.
        """
        if not pairs:
            return None
        alone = self._study.alone
        if is_difference and metric == "transfer":
            metric = "learned"
        found = []
        for task in self._study.tasks:
            size = len(self._scored[arm, pairs[0]].answers[task][-1])
            part = np.full((len(pairs), size), np.nan)
            for k, pair in enumerate(pairs):
                reference = None if alone is None else self._scored.get((alone, pair))
                shares = metric_rows(self._scored[arm, pair], task, metric, reference)
                if shares is not None:
                    part[k] = shares
            found.append(part)
        return None if any(np.isnan(part).all() for part in found) and metric != "forgetting" else found

    def difference(self, comparison: Comparison) -> tuple[Rows, list[Pair]] | None:
        """Return the paired difference of two arms, and its pairs; None if it was not measured."""
        pairs = self.pairs(*comparison.arms)
        a, b = (self.rows(arm, comparison.metric, pairs, is_difference=True) for arm in comparison.arms)
        if a is None or b is None:
            return None
        return [one - other for one, other in zip(a, b, strict=True)], pairs


def study_document(
    study: Study,
    runs: Mapping[str, Run],
    done: Sequence[StudyRun],
    registered: Registration,
    stages: Mapping[str, int],
) -> dict[str, Any]:
    """Return the content of study.json: plain data that the page and the table show."""
    results = Results(study, runs, done)
    file = study.file
    finished = {run.name for run in done}
    return {
        "schema_version": SCHEMA_VERSION,
        "study": file.name,
        "design": file.design,
        "tasks": study.tasks,
        "pairs": [asdict(pair) | {"name": pair.name, "order": list(pair.order)} for pair in study.pairs],
        "registered": registered.document(),
        "runs": [
            {"run": run.name, "arm": run.arm, "pair": run.pair.name, "finished": run.name in finished}
            for run in study.runs
        ],
        "missing": len(study.runs) - len(finished),
        "stages": dict(stages),
        "rows": results.num_rows(),
        "arms": [_arm(study, results, arm) for arm in file.arms],
        "comparisons": _comparisons(study, results),
    }


def _arm(study: Study, results: Results, arm: str) -> dict[str, Any]:
    runs, pairs = study.of_arm(arm), results.pairs(arm)
    metrics: dict[str, Any] = {}
    for metric in study.file.metrics:
        rows = results.rows(arm, metric, pairs)
        found = None if rows is None else statistics.estimate(rows, study.file.primary.tasks)
        metrics[metric] = found and {name: _number(getattr(found, name)) for name in ("value", "low", "high", "pairs")}
    return {
        "arm": arm,
        "method": runs[0].config.science.method.name,
        "settings": {name: value for name, value in study.file.arms[arm].items() if name != "pairs"},
        "finished": len(pairs),
        "runs": len(runs),
        "seconds": results.seconds(arm),
        "metrics": metrics,
    }


def _comparisons(study: Study, results: Results) -> list[dict[str, Any]]:
    """Return the comparisons, the primary one first; the others with p-values adjusted for their number."""
    primary = study.file.primary
    found = {}
    for number, each in enumerate((primary, *study.file.comparisons)):
        measured = results.difference(each)
        margin = each.margin or primary.margin
        if measured is not None and (effect := statistics.estimate(measured[0], primary.tasks, margin)) is not None:
            found[number] = effect, *measured
    others = {str(k): effect for k, (effect, _, _) in found.items() if k and effect.p is not None}
    p = statistics.holm({k: effect.p for k, effect in others.items() if effect.p is not None})
    p_equal = statistics.holm({k: effect.p_equal for k, effect in others.items() if effect.p_equal is not None})
    lines = []
    for number, each in enumerate((primary, *study.file.comparisons)):
        margin = each.margin or primary.margin
        line: dict[str, Any] = {
            "arms": list(each.arms),
            "metric": each.metric,
            "name": f"{each.arms[0]} - {each.arms[1]}",
            "primary": number == 0,
            "margin": margin,
            "planned_pairs": len(set(_pairs_of(study, each.arms[0])) & set(_pairs_of(study, each.arms[1]))),
        }
        if number not in found:
            lines.append(line | {"pairs": 0, "verdict": "undecided", "sentence": _unmeasured(each)})
            continue
        effect, rows, pairs = found[number]
        adjusted = (p.get(str(number)), p_equal.get(str(number))) if number else (None, None)
        decided = statistics.verdict(effect, margin, *adjusted)
        lines.append(line | _effect(study, each, effect, rows, pairs, decided, margin) | {"p_holm": adjusted[0]})
    return lines


def _pairs_of(study: Study, arm: str) -> list[Pair]:
    return [run.pair for run in study.of_arm(arm)]


def _effect(
    study: Study,
    comparison: Comparison,
    effect: Estimate,
    rows: Rows,
    pairs: Sequence[Pair],
    decided: Verdict,
    margin: float,
) -> dict[str, Any]:
    scope = study.file.primary.tasks
    other = statistics.estimate(rows, "fixed" if scope == "sampled" else "sampled", margin)
    assert other is not None
    single = [statistics.estimate([part[k : k + 1] for part in rows], "fixed") for k in range(len(pairs))]
    kind = _in_words(comparison.metric, decided)
    is_answers = comparison.metric in ("accuracy", "transfer")
    low, high = statistics.bootstrap(rows, scope)
    return {
        "verdict": kind,
        "sentence": sentence(comparison, effect, decided, margin),
        **{name: _number(value) for name, value in asdict(effect).items()},
        "tasks": scope,
        "other_tasks": {"tasks": "fixed" if scope == "sampled" else "sampled"}
        | {name: _number(getattr(other, name)) for name in ("low", "high", "se", "p")},
        "bootstrap": {"low": low, "high": high},
        "sign": asdict(statistics.sign_test(rows)),
        "mcnemar": asdict(statistics.mcnemar(rows)) if is_answers else None,
        "further_pairs": decided.further_pairs,
        "within_margin": decided.within_margin,
        "by_pair": [
            {"pair": pair.name, **{name: _number(getattr(each, name)) for name in ("value", "low", "high")}}
            for pair, each in zip(pairs, single, strict=True)
            if each is not None
        ],
        "by_task": [
            {"task": task, "value": _number(float(np.nanmean(part))) if not np.isnan(part).all() else None}
            for task, part in zip(study.tasks, rows, strict=True)
        ],
    }


def _in_words(metric: Metric, decided: Verdict) -> str:
    """Return the verdict on the first arm: a higher forgetting is worse."""
    if metric in LOWER_IS_BETTER:
        return {"better": "worse", "worse": "better"}.get(decided.kind, decided.kind)
    return decided.kind


def sentence(comparison: Comparison, effect: Estimate, decided: Verdict, margin: float) -> str:
    """Return the verdict as a sentence."""
    a, b = comparison.arms
    name, kind = NAMES[comparison.metric], _in_words(comparison.metric, decided)
    size = f"{points(effect.value)} points of {name}"
    if effect.low is not None and effect.high is not None:
        size += f", 95 % interval {points(effect.low)} to {points(effect.high)}"
    if kind in ("better", "worse"):
        inside = (
            f"; the difference is below the margin of {points(margin, sign=False)}" if decided.within_margin else ""
        )
        return f"{a} is {kind} than {b}: {size}{inside}."
    if kind == "equal":
        return f"{a} and {b} are equal within {points(margin, sign=False)} points: {size}."
    if effect.pairs < 2:
        return f"Undecided between {a} and {b}: {size}. One pair does not show how orders and seeds vary."
    if decided.further_pairs is None:
        more = f"No number of pairs up to {statistics.MAX_PAIRS} would decide: it takes more test rows or tasks"
    else:
        pairs = "pair" if decided.further_pairs == 1 else "pairs"
        more = f"About {decided.further_pairs} more {pairs} would decide, if the difference stays"
    return f"Undecided between {a} and {b}: {size}. {more}."


def _unmeasured(comparison: Comparison) -> str:
    a, b = comparison.arms
    return f"Undecided between {a} and {b}: no pair has been measured in both."


def points(value: float, *, sign: bool = True) -> str:
    """Return a fraction as points (hundredths)."""
    text = f"{100 * value:{'+' if sign else ''}.2f}"
    return text.replace("-0.00", "0.00").replace("+0.00", "0.00")


def _number(value: Any) -> Any:
    """Return a number that JSON can hold."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
