import json
from typing import Any

import pytest

from cl_dist.data.rows import Row
from cl_dist.data.tasks import TaskConfig
from cl_dist.data.unlabelled import read_unlabelled
from cl_dist.errors import DataError


def task(**fields: Any) -> TaskConfig:
    source = {"kind": "jsonl", "path": "x.jsonl", "columns": fields.pop("columns", {})}
    return TaskConfig.model_validate({"id": "food", "source": source} | fields)


def read(of: TaskConfig, *lines: Any) -> list[tuple[Any, Row]]:
    return list(read_unlabelled([line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines], of))


def test_plain_fields_are_read_and_ids_keep_their_type() -> None:
    lines = [{"text": "a", "id": "x"}, b"\n", {"text": "b", "id": 7}, {"text": "c", "label": "never looked at"}]
    assert read(task(), *lines) == [
        ("x", Row("x", "a", None, "")),
        (7, Row("7", "b", None, "")),
        (2, Row("2", "c", None, "")),  # its number, as rows without an id get it in a data file
    ]


@pytest.mark.parametrize(
    "line",
    [
        {"review": "a", "aspect": "b", "key": 1},
        {"text": "a", "text_pair": "b", "id": 1},
        {"Sentence": "a", "aspect": "b", "key": 1},
        {"review": "a", "text": "another column of the file", "aspect": "b", "id": "another", "key": 1},
    ],
)
def test_the_tasks_own_names_and_renamings_come_first_and_plain_names_do(line: dict[str, Any]) -> None:
    of = task(text="review", text_pair="aspect", row_id="key", columns={"Sentence": "review"})
    assert read(of, line) == [(1, Row("1", "a", "b", ""))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2: not JSON: "),
        (b"\xff\xfe", "line 2: not utf-8: byte 0xff at offset 0 of the line"),
        (b"[" * 100_000, "line 2: not usable JSON: nested too deeply"),
        (["a"], "line 2: expected a JSON object such as .* got list"),
        ({"txt": "a"}, "line 2: field text is missing; did you mean 'txt'"),
        ({}, "line 2: field text is missing$"),
        ({"text": 3}, "line 2: field text: expected text, got int"),
        ({"text": " "}, "line 2: field text: is empty"),
        ({"text": "a\ud800"}, "line 2: field text: contains half a surrogate pair"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 2: an integer of 5000 digits; the limit is 4300"),
        (b'{"text": "a", "text": "b"}', "line 2: duplicate key 'text'"),
        ({"text": float("nan")}, "line 2: field text: expected text, got nan"),
        ({"text": "a", "id": "a\ud800"}, "line 2: field id: contains half a surrogate pair"),
        ({"text": "a", "id": 1.5}, "line 2: field id: expected text or an integer as id, got float"),
        ({"text": "a", "id": None}, "line 2: field id: .* got NoneType"),
        ({"text": "a", "text_pair": "b"}, "line 2: field text_pair: task food has no text_pair"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(task(), {"text": "fine"}, line)


def test_a_missing_second_text_is_named_in_both_ways() -> None:
    with pytest.raises(DataError, match=r"line 1: field aspect \(or 'text_pair'\) is missing"):
        read(task(text_pair="aspect"), {"text": "a"})


def test_lines_before_a_bad_one_are_yielded() -> None:
    rows = read_unlabelled([b'{"text": "a"}', b"?"], task())
    assert next(rows)[1].text == "a"
