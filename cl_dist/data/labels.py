"""Detection of labels that look the same to a person but differ as text."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from cl_dist.errors import printable

_TWINS = str.maketrans(
    # Cyrillic and Greek letters that look like a Latin one.
    "\u0410\u0412\u0415\u0405\u0406\u0408\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"
    "\u0430\u0435\u0455\u0456\u0458\u043e\u0440\u0441\u0443\u0445\u04bb"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "ABESIJKMHOPCTYXaesijopcyxhABEZHIKMNOPTYXo",
)
_UNSEEN = frozenset("\u034f\u115f\u1160\u180b\u180c\u180d").union(map(chr, range(0xFE00, 0xFE10)))
"""Invisible characters outside the Unicode category of format characters: joiners, fillers, variation selectors."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,9})?")
_MISSING = ("nan", "null", "<na>", "nat")
"""Text that programs write for missing values."""


def likeness(label: str) -> str:
    """Return a canonical form that is equal for labels differing in white space, case or Unicode representation only.

    Removes invisible characters, unifies look-alike letters and marks, and normalizes numbers.
    """
    visible = "".join(map(_visible, unicodedata.normalize("NFKC", label).translate(_TWINS)))
    text = " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())
    return _value(text) if _NUMBER.fullmatch(text) else text


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if character.isspace():
        return " "
    if kind in ("Cc", "Cf", "Cs") or character in _UNSEEN:
        return ""
    if kind == "Pd" or character == "\u2212":
        return "-"
    return "'" if kind in ("Pi", "Pf") or character == '"' else character


def _value(text: str) -> str:
    """Return a canonical form of a number: equal for 1, 1.0, +1 and 01."""
    try:
        sign, digits, exponent = Decimal(text).as_tuple()
    except InvalidOperation:
        return text
    bare = "".join(map(str, digits)).lstrip("0")
    significant = bare.rstrip("0")
    return f"{'-' * sign}{significant}e{int(exponent) + len(bare) - len(significant)}" if significant else "0"


def is_invisible(label: str) -> bool:
    """Return whether a label has no visible characters."""
    return not likeness(label)


def escaped(label: str, others: Sequence[str]) -> str:
    """Return a label in quotes; escapes invisible characters, and non-ASCII ones that are not in all of the others."""
    common = set(label).intersection(*others)
    return f"'{''.join(c if c.isascii() or c in common else _escaped(c) for c in printable(label, ''))}'"


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def label_warnings(rows: Mapping[str, int]) -> list[str]:
    """Return warnings, given the number of rows of each label."""
    groups: dict[str, list[str]] = {}
    for label in rows:
        groups.setdefault(likeness(label), []).append(label)
    warnings = []
    for alike in groups.values():
        if len(alike) > 1:
            names = ", ".join(f"{escaped(label, alike)} ({_counted(rows[label])})" for label in alike)
            warnings.append(
                f"labels {names} look the same but are {len(alike)} classes; source.label_map can merge them"
            )
    warnings += [
        f"label {label!r} ({_counted(count)}) looks like a missing value; label_map: {{{label!r}: null}} drops it"
        for label, count in rows.items()
        if label.strip().casefold() in _MISSING
    ]
    return warnings


def _counted(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"
