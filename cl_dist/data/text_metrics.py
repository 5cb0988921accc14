"""Metrics of free-text answers. Scores are in [0, 1]; that of a task is the mean over rows.

Sources: exact match and token F1 of Rajpurkar et al. 2016 (SQuAD), with a normalization that does not equate different
answers (see `plain`); turn_state and joint_state, the turn and joint accuracy of decaNLP (McCann et al. 2018) on WOZ;
ROUGE-L and BLEU from rouge-score and sacrebleu, which need the `text` extra.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import mean
from typing import Any

from cl_dist.errors import ConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = re.compile(f"[{re.escape(string.punctuation)}]+")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")


def plain(text: str) -> str:
    """Return a text without case, punctuation, articles and repeated white space.

    Differs from SQuAD, which maps "A" and "+" to the empty text, and "-1", "1" and ".1" to the same one. Keeps marks
    that belong to a number, except commas between thousands; keeps articles, then punctuation, if nothing else remains.
    """
    lowered = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text.lower())
    bare = _MARKS.sub(_of_a_number, lowered)
    steps = (_ARTICLES.sub(" ", bare), bare, lowered)
    return next((words for step in steps if (words := " ".join(step.split()))), "")


def _of_a_number(marks: re.Match[str]) -> str:
    """Return the part of a run of punctuation that belongs to the number after it (inner marks, sign, point)."""
    text, start = marks.string, marks.start()
    before, after = text[max(start - 2, 0) : start], text[marks.end() : marks.end() + 1]
    if not after.isdecimal():
        return ""
    if before[-1:].isdecimal():  # 1.5, 10:30, 1/2
        return marks[0]
    if before[-1:].isalpha() and len(marks[0]) == 1:  # covid-19, and the exponent of 1e-5
        return "-" if marks[0] == "-" and before[-1] == "e" and before[0].isdecimal() else ""
    return ("-" if "-" in marks[0] else "") + ("0." if marks[0].endswith(".") else "")


def exact_match(truth: str, answer: str) -> float:
    """Return 1 if the two are equal except for case, punctuation, articles and white space (see `plain`)."""
    return float(plain(truth) == plain(answer))


def token_f1(truth: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over the bags of words of the two."""
    wanted, found = Counter(plain(truth).split()), Counter(plain(answer).split())
    if not wanted or not found:
        return float(wanted == found)
    common = sum((wanted & found).values())
    return 2 * common / (sum(wanted.values()) + sum(found.values()))


def state(text: str) -> tuple[frozenset[tuple[str, str]], frozenset[str]]:
    """Parse "slot: value, slot: value; request, request" into slots with their values, and requests.

    The last value of a repeated slot counts; parts without a colon before the semicolon are ignored.
    """
    informed, _, requested = text.lower().partition(";")
    pairs = (part.partition(":") for part in informed.split(",") if ":" in part)
    slots = {slot.strip(): value.strip() for slot, _, value in pairs}
    return frozenset(slots.items()), frozenset(part.strip() for part in requested.split(",") if part.strip())


def turn_state(truth: str, answer: str) -> float:
    """Return 1 if slots, values and requests equal those of the truth, in any order."""
    return float(state(truth) == state(answer))


def turn_of(row_id: str) -> tuple[str, int] | None:
    """Return (dialogue, turn number) of an id such as woz-7-0, or None for other formats."""
    dialogue, _, turn = row_id.rpartition("-")
    return (dialogue, int(turn)) if dialogue and turn.isascii() and turn.isdecimal() and len(turn) < 10 else None


def joint_state(dialogues: Sequence[str], truths: Sequence[str], answers: Sequence[str]) -> float:
    """Return the fraction of turns after which the accumulated slots of the dialogue equal those of the truth.

    Turns must be in order; a slot keeps its value until it is set again. Requests are ignored.
    """
    known: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    right = 0
    for dialogue, truth, answer in zip(dialogues, truths, answers, strict=True):
        wanted, found = known.setdefault(dialogue, ({}, {}))
        wanted.update(state(truth)[0])
        found.update(state(answer)[0])
        right += wanted == found
    return right / len(truths)


def rouge_l(truths: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure, with stemming."""
    scorer = _library("rouge_l").RougeScorer(["rougeL"], use_stemmer=True)
    return mean(scorer.score(t, a)["rougeL"].fmeasure for t, a in zip(truths, answers, strict=True))


def bleu(truths: Sequence[str], answers: Sequence[str]) -> float:
    """Return corpus BLEU, scaled to [0, 1]."""
    score: float = _library("bleu").corpus_bleu(list(answers), [list(truths)]).score
    return score / 100


_LIBRARIES = {"rouge_l": "rouge_score.rouge_scorer", "bleu": "sacrebleu"}
"""Modules that compute metrics."""


def check_library(metric: str) -> None:
    """Raise ConfigError if the package of a metric is not installed."""
    if metric in _LIBRARIES:
        _library(metric)


def _library(metric: str) -> Any:
    name = _LIBRARIES[metric]
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(f"metric {metric!r} needs {package}: pip install 'cl-dist[text]'") from None


def _mean_of(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], float]:
    def over(truths: Sequence[str], answers: Sequence[str]) -> float:
        return mean(score(t, a) for t, a in zip(truths, answers, strict=True))

    return over


ROW_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "turn_state": turn_state,
}
"""(truth, answer) -> score of a row, for the metrics that are means over rows."""
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    **{name: _mean_of(score) for name, score in ROW_METRICS.items()},
    "rouge_l": rouge_l,
    "bleu": bleu,
}
"""(truths, answers) -> score, by name as in `tasks.metric`; joint_state has another signature, with dialogues."""
