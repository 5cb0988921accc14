"""Rationales: the spans of a text that justify its label, from a data file to the tokens of a model."""

from collections.abc import Sequence
from typing import Any, Literal

Span = tuple[int, int]


def read_spans(given: Any, text: str, unit: Literal["words", "chars"]) -> tuple[tuple[Span, ...], str | None]:
    """Return ([start, end) spans in characters, None), or ((), what is wrong with them)."""
    if given is None:
        return (), None
    if not isinstance(given, list) or not all(_is_pair(pair) for pair in given):
        return (), "expected a list of [start, end] offsets"
    places = _words(text) if unit == "words" else None
    size = len(text) if places is None else len(places)
    for start, end in given:
        if not 0 <= start < end <= size:
            return (), f"[{start}, {end}] is no span of a text of {size} {unit}"
    if places is None:
        return tuple((start, end) for start, end in given), None
    return tuple((places[start][0], places[end - 1][1]) for start, end in given), None


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(offset) is int for offset in pair)


def _words(text: str) -> list[Span]:
    """Return where each word stands: what lies between single spaces, whatever other white space is in it."""
    found, start = [], 0
    for word in text.split(" "):
        found.append((start, start + len(word)))
        start += len(word) + 1
    return found


def joined(spans: Sequence[Span]) -> list[Span]:
    """Return spans in order, those that touch made one, those of white space alone left out by their emptiness."""
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
    """Return for each token whether the characters that it stands for lie in a span, wholly or in part."""
    return [start < end and any(start < last and first < end for first, last in spans) for start, end in offsets]
