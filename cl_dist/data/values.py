"""Parsing of JSON lines, and checks of texts, ids, labels and words in raw rows."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from cl_dist.config import surrogate_fault
from cl_dist.data.labels import is_invisible


class _UnusableError(ValueError):
    """JSON that Python parses with a loss of information."""


def json_fields(text: str, expected: str = "a JSON object with named fields") -> dict[str, Any]:
    """Return the named fields of one JSON line.

    Raises:
        ValueError: If the line is invalid, or repeats a key.
    """
    try:
        values = json.loads(text, object_pairs_hook=_distinct, parse_int=_integer)
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
        raise _UnusableError(f"duplicate key {twice!r}; one of its values would be lost")
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise _UnusableError(f"an integer of {len(digits.lstrip('-'))} digits; the limit is {most}") from None


def word(value: Any) -> str | None:
    """Return a scalar as text (booleans as true, false); None for other values and for numbers that are not finite."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, str | int | float) else None


def text_fault(value: Any, *, may_be_empty: bool = False) -> str | None:
    """Return the fault of a text, if any."""
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"expected text, got {_kind(value)}"
    if not may_be_empty and not value.strip():
        return "is empty"
    return surrogate_fault(value)


def id_fault(value: Any) -> str | None:
    """Return the fault of a row id, if any."""
    if value == "":
        return "is missing"
    if isinstance(value, bool) or not isinstance(value, str | int):
        missing = "is missing; " if value is None else ""
        return f"{missing}expected text or an integer as id, got {_kind(value)}"
    return surrogate_fault(str(value))


def label_fault(value: Any) -> str | None:
    """Return the fault of a label, if any."""
    if value is None:
        return "is missing"
    label = word(value)
    if label is None:
        return f"expected a label, got {_kind(value)}"
    if not label.strip():
        return "is empty"
    if is_invisible(label):
        return f"has no visible characters: {label!a}"
    return surrogate_fault(label)


def word_fault(value: Any) -> str | None:
    """Return the fault of an optional word, if any."""
    if value is None:
        return None
    found = word(value)
    return f"expected a word, got {_kind(value)}" if found is None else surrogate_fault(found)


def _kind(value: Any) -> str:
    """Return the type of an unexpected value for a message; nan and inf by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not a number" if math.isnan(value) else f"{value}, which is not finite"
    return type(value).__name__
