"""Rationales: spans of a text that justify its label, in words, characters and tokens."""

from collections.abc import Sequence
from typing import Any, Literal

Span = tuple[int, int]


def read_spans(given: Any, text: str, unit: Literal["words", "chars"]) -> tuple[tuple[Span, ...], str | None]:
    """Return ([start, end) spans in characters, None), or ((), error message)."""
    if given is None:
        return (), None
    if not isinstance(given, list) or not all(_is_pair(pair) for pair in given):
        return (), "expected a list of [start, end] offsets"
    words = _words(text) if unit == "words" else None
    size = len(text) if words is None else len(words)
    for start, end in given:
        if not 0 <= start < end <= size:
            return (), f"[{start}, {end}] is not a span of a text with {size} {unit}"
    if words is None:
        return tuple((start, end) for start, end in given), None
    return tuple((words[start][0], words[end - 1][1]) for start, end in given), None


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(offset) is int for offset in pair)


def _words(text: str) -> list[Span]:
    """Return the span of each word; single spaces separate words, other white space does not."""
    found, start = [], 0
    for word in text.split(" "):
        found.append((start, start + len(word)))
        start += len(word) + 1
    return found


def joined(spans: Sequence[Span]) -> list[Span]:
    """Merge spans, given in order, that overlap or are at most one character apart; drop empty ones."""
    found: list[Span] = []
    for start, end in spans:
        if start >= end:
            continue
        if found and start <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether its characters overlap a span."""
    return [start < end and any(start < last and first < end for first, last in spans) for start, end in offsets]
