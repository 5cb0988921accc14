"""Multinomial naive Bayes over lower-case words with add-one smoothing.

A fast classifier to check whether pseudo-samples match their labels. It is weak: compare its agreement with
pseudo-samples only to its agreement with real rows.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(text.lower())


class NaiveBayes:
    """Classifier trained on (text, label) pairs; ties go to the first label in alphabetical order."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._seen: dict[str, Counter[str]] = {}
        self._rows: Counter[str] = Counter()
        for text, label in pairs:
            self._rows[label] += 1
            self._seen.setdefault(label, Counter()).update(words(text))
        self._vocabulary = {word for counts in self._seen.values() for word in counts}
        self._total = {label: sum(counts.values()) + len(self._vocabulary) for label, counts in self._seen.items()}

    def answer(self, text: str) -> str:
        """Return the most likely label."""
        scores = self._scores(text)
        return max(sorted(scores), key=scores.__getitem__)

    def surprise(self, text: str, label: str) -> float:
        """Return -log of the label's probability, in nats; infinite for an unseen label."""
        scores = self._scores(text)
        if label not in scores:
            return math.inf
        best = max(scores.values())
        return best + math.log(sum(math.exp(score - best) for score in scores.values())) - scores[label]

    def _scores(self, text: str) -> dict[str, float]:
        """Return the log-probability of each label, up to a constant."""
        known = [word for word in words(text) if word in self._vocabulary]
        return {
            label: math.log(self._rows[label])
            + sum(math.log((counts[word] + 1) / self._total[label]) for word in known)
            for label, counts in self._seen.items()
        }

    def agreement(self, pairs: Sequence[tuple[str, str]]) -> float | None:
        """Return the accuracy on pairs; None without pairs."""
        return sum(self.answer(text) == label for text, label in pairs) / len(pairs) if pairs else None
