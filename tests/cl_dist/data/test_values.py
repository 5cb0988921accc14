import json
import math
from pathlib import Path
from typing import Any

import pytest

from cl_dist.data.labels import escaped, label_warnings, likeness
from cl_dist.data.load import check_task
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.data.values import json_fields

TASK = {"id": "food", "row_id": "id", "text_pair": "pair", "environment": "author"}


def lines(*changes: dict[str, Any]) -> list[str]:
    """Rows of all splits, the first of which are changed."""
    kinds = [(split, label) for split in ("train", "dev", "test") for label in ("bad", "good") for _ in (0, 1)]
    found = []
    for number, (split, label) in enumerate(kinds):
        row = {"id": number, "text": f"text {number}", "pair": "", "author": "a", "label": label, "split": split}
        found.append(json.dumps(row | (changes[number] if number < len(changes) else {})))
    return found


def checked(path: Path, written: list[str], **task: Any) -> tuple[list[str], tuple[str, ...]]:
    """Return the faults and the warnings of some lines."""
    path.write_text("".join(f"{line}\n" for line in written), encoding="utf8")
    source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
    found = check_task(TaskConfig.model_validate({"source": source, **TASK, **task}), DataConfig())
    return [str(fault).removeprefix(str(path)) for fault in found.faults], found.warnings


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["text", "pair", "label", "id", "author", "split"])
def test_a_number_that_is_none_is_a_fault_wherever_it_is_read(tmp_path: Path, field: str, value: float) -> None:
    (fault,) = checked(tmp_path / "a.jsonl", lines({field: value}))[0]
    assert fault.startswith(f", line 1, field {field}: ")
    assert str(value) in fault


@pytest.mark.parametrize("field", ["text", "pair", "label", "id", "author"])
def test_half_a_character_is_a_fault_wherever_it_is_read(tmp_path: Path, field: str) -> None:
    (fault,) = checked(tmp_path / "a.jsonl", lines({field: "ba\ud83d"}))[0]
    assert fault == f", line 1, field {field}: contains half a surrogate pair, '\\ud83d', at position 2"


def test_what_is_not_read_may_hold_anything(tmp_path: Path) -> None:
    odd = {"more": math.nan, "and": {"more": [None, "\ud83d"]}, "\ud83d": 1}
    assert checked(tmp_path / "a.jsonl", lines(odd)) == checked(tmp_path / "b.jsonl", lines())
    assert not checked(tmp_path / "a.jsonl", lines(odd))[0]


@pytest.mark.parametrize("value", ["1.5", "true", "1e400", "[1]"])
def test_numbers_are_labels_and_lists_are_not(tmp_path: Path, value: str) -> None:
    written = [line.replace('"bad"', value) for line in lines()]
    faults, _ = checked(tmp_path / "a.jsonl", written)
    assert bool(faults) == (value in ("1e400", "[1]"))


@pytest.mark.parametrize("where", ["number", "text", "label", "more", "deep"])
def test_a_number_of_5000_digits_is_named_with_its_line_and_the_rest_is_read(tmp_path: Path, where: str) -> None:
    written = lines()
    huge = "9" * 5000
    put = f'{{"a": [{huge}]}}' if where == "deep" else huge
    written[0] = json.dumps({**json.loads(written[0]), where: 0}).replace(f'"{where}": 0', f'"{where}": {put}')
    written[5] = written[5].replace('"text 5"', "3")
    faults, _ = checked(tmp_path / "a.jsonl", written)
    assert faults == [
        ", line 1: an integer of 5000 digits; the limit is 4300",
        ", line 6, field text: expected text, got int",
    ]


def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path: Path) -> None:
    written = lines()
    written[2] = written[2].replace('"label": "good"', '"label": "good", "label": "bad"')
    assert checked(tmp_path / "a.jsonl", written)[0] == [
        ", line 3: duplicate key 'label'; one of its values would be lost"
    ]
    with pytest.raises(ValueError, match="duplicate key 'b'"):
        json_fields('{"a": {"b": 1, "b": 1}}')


@pytest.mark.parametrize(
    "others",
    [
        ("good ",),
        ("Good", "GOOD"),
        ("go\u200bod",),
        ("\u0261ood".replace("\u0261", "g\u00ad"),),
        ("g\u043e\u043ed",),
        ("good\ufe0f",),
        ("\uff47ood",),
        ("good\u00a0", "\tgood"),
    ],
)
def test_labels_that_a_person_takes_for_one_are_a_warning_with_their_rows(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    warnings = checked(tmp_path / "a.jsonl", lines(*({"label": other} for other in others)))[1]
    assert all(text.isprintable() for text in warnings)
    (warning,) = [text for text in warnings if "classes" in text]
    assert warning.isascii()
    assert "'good' (" in warning
    assert warning.count("(1 row)") == len(others)
    assert f"are {len(others) + 1} classes" in warning


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("caf\u00e9", "cafe\u0301"), ("\uac00", "\u1100\u1161"), ("stra\u00dfe", "STRASSE"), ("a  b", "a\u3000b")],
        *[("1", "1.0"), ("1", "01"), ("10", "1e1"), ("0", "-0.0"), ("1", "\u0661"), ("2.50", "2.5"), ("1", "\uff11")],
        *[("don't", "don\u2019t"), ("non-fiction", "non\u2011fiction"), ("a\u0000", "a")],
    ],
)
def test_labels_are_alike(one: str, other: str) -> None:
    assert likeness(one) == likeness(other)
    assert len(label_warnings({one: 1, other: 2})) == 1
    assert escaped(one, [other]) != escaped(other, [one])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[
            ("+", "-"),
            ("1", "-1"),
            ("1", "11"),
            ("true", "1"),
            ("very good", "verygood"),
            ("\u826f", "\u60aa"),
        ],
        *[("1" * 40, "1" * 39 + "2"), ("1e999999999999", "2e999999999999"), ("sci.med", "sci.space"), ("0", "00a")],
    ],
)
def test_labels_are_not_alike(one: str, other: str) -> None:
    assert likeness(one) != likeness(other)
    assert not label_warnings({one: 1, other: 2})


def test_declared_labels_are_looked_at_too_and_what_reads_like_a_missing_value(tmp_path: Path) -> None:
    _, warnings = checked(tmp_path / "a.jsonl", lines(), labels=["good", "bad", "Bad"])
    assert any("'bad' (6 rows), 'Bad' (0 rows)" in warning for warning in warnings)
    _, warnings = checked(tmp_path / "a.jsonl", lines({"label": "nan"}))
    assert "label 'nan' (1 row) looks like a missing value; label_map: {'nan': null} drops it" in warnings


def test_a_fault_shows_in_what_a_label_differs(tmp_path: Path) -> None:
    written = [line.replace('"good"', '"caf\\u00e9"') for line in lines()]
    written[-1] = written[-1].replace("caf\\u00e9", "cafe\\u0301")
    (fault,) = checked(tmp_path / "a.jsonl", written)[0]
    assert r"label 'cafe\u0301' of test never occurs in train; 'caf\xe9' looks the same" in fault


def test_a_label_that_nobody_sees_is_a_fault(tmp_path: Path) -> None:
    (fault,) = checked(tmp_path / "a.jsonl", lines({"label": "\u200b\u00ad"}))[0]
    assert fault == r", line 1, field label: has no visible characters: '\u200b\xad'"


def test_nothing_that_a_terminal_obeys_is_in_a_fault_or_a_warning(tmp_path: Path) -> None:
    harm = "\x1b[31m\x9bbad\r\x07"
    changes = [{"label": harm}, {"label": f"{harm} "}, {"split": harm}, {"id": harm}, {"id": harm}]
    for task in ({}, {"label": f"lab{harm}"}):
        faults, warnings = checked(tmp_path / f"{harm}.jsonl", lines(*changes), **task)
        assert faults
        assert all(text.isprintable() for text in (*faults, *warnings))
