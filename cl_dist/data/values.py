"""Values of a row as its file gives them: JSON lines, and what may stand for a text, an id, a label or a word."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from cl_dist.data.labels import is_invisible


class _UnusableError(ValueError):
    """JSON that Python would read, and lose something of."""


def json_fields(text: str, expected: str = "a JSON object with named fields") -> dict[str, Any]:
    """Return the named fields of one JSON line.

    Raises:
        ValueError: With what is wrong with the line, a key that comes twice for one.
    """
    try:
        values = json.loads(text, object_pairs_hook=_distinct, parse_int=_whole)
    except _UnusableError:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected {expected}, got {type(values).__name__}")
    return values


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise _UnusableError(f"the key {twice!r} comes twice; one of its values would be lost")
    return values


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise _UnusableError(f"a whole number of {len(digits.lstrip('-'))} digits; at most {most} are read") from None


def word(value: Any) -> str | None:
    """Return a single value as the word a person would write for it, and None for what is no single value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, str | int | float) else None


def text_fault(value: Any, *, may_be_empty: bool = False) -> str | None:
    """Return what is wrong with a text, if anything."""
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"expected text, got {_kind(value)}"
    if not may_be_empty and not value.strip():
        return "is empty"
    return _half_character(value)


def id_fault(value: Any) -> str | None:
    """Return what is wrong with the id of a row, if anything."""
    if value == "":
        return "is missing"
    if isinstance(value, bool) or not isinstance(value, str | int):
        missing = "is missing; " if value is None else ""
        return f"{missing}expected text or a whole number as id, got {_kind(value)}"
    return _half_character(str(value))


def label_fault(value: Any) -> str | None:
    """Return what is wrong with a label, if anything."""
    if value is None:
        return "is missing"
    label = word(value)
    if label is None:
        return f"expected a label, got {_kind(value)}"
    if not label.strip():
        return "is empty"
    if is_invisible(label):
        return f"holds nothing that can be seen: {label!a}"
    return _half_character(label)


def word_fault(value: Any) -> str | None:
    """Return what is wrong with a word that may be missing, if anything."""
    if value is None:
        return None
    found = word(value)
    return f"expected a word, got {_kind(value)}" if found is None else _half_character(found)


def _kind(value: Any) -> str:
    """Return what to call a value that is none of those expected; of numbers that are none, the number."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is no number" if math.isnan(value) else f"{value}, which is no finite number"
    return type(value).__name__


def _half_character(text: str) -> str | None:
    """Find half a surrogate pair, which JSON can spell but no tokenizer, hash or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {text[error.start]!a} at position {error.start}"
    return None
