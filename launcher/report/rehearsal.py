"""Check of pseudo-samples: whether their labels can be trusted, by statistical tests."""

from collections.abc import Mapping, Sequence
from math import exp, lgamma
from typing import Any

from launcher.report.figures import clean

Summary = Mapping[str, Any]
LEVEL = 0.01
"""Pseudo-samples that differ from real rows by chance alone are reported in less than this share of cases."""
LEAST_DROP = 0.1
"""Smaller drops of label agreement are not reported: with many samples any drop is significant."""


def warnings(replay: Sequence[Summary], tasks: Sequence[Summary]) -> list[str]:
    """Return a sentence for each set of pseudo-samples whose labels differ from those of real rows.

    A set is reported if a word classifier trained on the real rows agrees with its labels less often than with those of
    the real test rows, by at least LEAST_DROP and with p < LEVEL in Fisher's exact test (one-sided); or if all samples
    have one label although the commonest label of the real rows would give that by chance in less than LEVEL of cases.
    """
    known, found = {task["id"]: task for task in tasks}, []
    for one in replay:
        task, kept = known.get(one["task"]), one["kept"]
        if task is None or not kept:
            continue
        reasons = []
        own, real, rows = one.get("label_agreement"), one.get("label_agreement_real"), task["rows"]["test"]
        if own is not None and real is not None and rows and real - own >= LEAST_DROP:
            chance = fisher(round(own * kept), kept, round(real * rows), rows)
            if chance < LEVEL:
                reasons.append(
                    f"labels agree {own:.2f} ({kept} samples) against {real:.2f} ({rows} real rows), p {_small(chance)}"
                )
        labels, commonest = [label for label, count in one["labels"].items() if count], task.get("majority")
        if len(labels) == 1 and len(task["labels"]) > 1 and commonest is not None and commonest**kept < LEVEL:
            reasons.append(f"all {kept} samples are “{clean(labels[0])}”")
        if reasons:
            found.append(f"{clean(one['task'])} before {clean(one['before'])}: {'; '.join(reasons)}")
    return found


def fisher(right: int, total: int, other_right: int, other_total: int) -> float:
    """Return the p-value of Fisher's exact test, one-sided: at most `right` of `total` if both shares are equal."""
    positive, everyone = right + other_right, total + other_total
    least = max(0, positive - other_total)
    whole = _log_choose(everyone, positive)
    terms = (
        exp(_log_choose(total, k) + _log_choose(other_total, positive - k) - whole) for k in range(least, right + 1)
    )
    return min(1.0, sum(terms))


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _small(chance: float) -> str:
    return f"= {chance:.2g}" if chance >= 1e-4 else "< 0.0001"
