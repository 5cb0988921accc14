"""Labels that a person would take for one label, and that a program keeps apart."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from cl_dist.errors import printable

_TWINS = str.maketrans(
    # Cyrillic and Greek letters with the shape of a Latin one.
    "\u0410\u0412\u0415\u0405\u0406\u0408\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"
    "\u0430\u0435\u0455\u0456\u0458\u043e\u0440\u0441\u0443\u0445\u04bb"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "ABESIJKMHOPCTYXaesijopcyxhABEZHIKMNOPTYXo",
)
_UNSEEN = frozenset("\u034f\u115f\u1160\u180b\u180c\u180d").union(map(chr, range(0xFE00, 0xFE10)))
"""Characters without a shape of their own that Unicode does not file under formats: joiners, fillers, selectors."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,9})?")
_MISSING = ("nan", "null", "<na>", "nat")
"""What programs write for a value that is missing."""


def likeness(label: str) -> str:
    """Return what a person reads: equal for labels that differ in white space, case, or how a character is spelled.

    Characters that are not seen are left out, letters and marks that look alike are one, and numbers are their value.
    """
    seen = "".join(map(_seen, unicodedata.normalize("NFKC", label).translate(_TWINS)))
    text = " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())
    return _value(text) if _NUMBER.fullmatch(text) else text


def _seen(character: str) -> str:
    kind = unicodedata.category(character)
    if character.isspace():
        return " "
    if kind in ("Cc", "Cf", "Cs") or character in _UNSEEN:
        return ""
    if kind == "Pd" or character == "\u2212":
        return "-"
    return "'" if kind in ("Pi", "Pf") or character == '"' else character


def _value(text: str) -> str:
    """Return a number without what does not change it: 1, 1.0, +1 and 01 are one."""
    try:
        sign, digits, exponent = Decimal(text).as_tuple()
    except InvalidOperation:
        return text
    bare = "".join(map(str, digits)).lstrip("0")
    kept = bare.rstrip("0")
    return f"{'-' * sign}{kept}e{int(exponent) + len(bare) - len(kept)}" if kept else "0"


def is_invisible(label: str) -> bool:
    """Return whether a person sees nothing of a label."""
    return not likeness(label)


def told_apart(label: str, others: Sequence[str]) -> str:
    """Return a label in quotes, escaped what is not seen, and what is no ASCII and not in all of the others."""
    common = set(label).intersection(*others)
    return f"'{''.join(c if c.isascii() or c in common else _escaped(c) for c in printable(label, ''))}'"


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def label_warnings(rows: Mapping[str, int]) -> list[str]:
    """Return what to warn of, given the number of rows of each label."""
    groups: dict[str, list[str]] = {}
    for label in rows:
        groups.setdefault(likeness(label), []).append(label)
    found = []
    for alike in groups.values():
        if len(alike) > 1:
            names = ", ".join(f"{told_apart(label, alike)} ({_counted(rows[label])})" for label in alike)
            found.append(f"labels {names} read alike and are {len(alike)} classes; source.label_map can make them one")
    found += [
        f"label {label!r} ({_counted(count)}) reads like a missing value; label_map: {{{label!r}: null}} drops it"
        for label, count in rows.items()
        if label.strip().casefold() in _MISSING
    ]
    return found


def _counted(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"
