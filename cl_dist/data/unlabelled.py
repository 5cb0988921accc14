"""Rows for prediction: JSON lines with the field names of a task's data, or `text`, `text_pair` and `id`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.data.rows import Row, Where
from cl_dist.data.tasks import TaskConfig
from cl_dist.data.values import id_fault, json_fields, text_fault
from cl_dist.errors import DataError


def read_unlabelled(lines: Iterable[bytes], task: TaskConfig) -> Iterator[tuple[Any, Row]]:
    """Yield (original id, row without a label) of every line that is not blank.

    Looks up a field by the task's name for it, after the renaming of `source.columns`, then by the plain name. Ignores
    other fields, such as a label. A row without an id gets its 0-based number.

    Raises:
        DataError: At the first invalid line; the message has its 1-based number.
    """
    number = 0
    for line, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        try:
            yield _row(_values(data), task, number, Where("stdin", line))
        except ValueError as error:
            raise DataError(f"line {line}: {error}") from None
        number += 1


def rows_of_texts(texts: Sequence[str], pairs: Sequence[str] | None, task: TaskConfig) -> list[Row]:
    """Return rows without labels; pairs are the second texts of a task that reads two. A row's id is its position.

    Raises:
        DataError: At the first text that cannot be used.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs: expected one pair for each text")
    rows = []
    for number, text in enumerate(texts):
        values = {"text": text} if pairs is None else {"text": text, "text_pair": pairs[number]}
        try:
            rows.append(_row(values, task, number, None)[1])
        except ValueError as error:
            raise DataError(f"row {number}: {error}") from None
    return rows


def _values(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not utf-8: byte 0x{data[error.start]:02x} at offset {error.start} of the line") from None
    return json_fields(text, 'a JSON object such as {"text": ...}')


def _row(values: Mapping[str, Any], task: TaskConfig, number: int, where: Where | None) -> tuple[Any, Row]:
    renamed = {name: value for name, value in values.items() if name not in task.source.columns}
    renamed |= {new: values[old] for old, new in task.source.columns.items() if old in values}
    name, text = _field(renamed, values, task.text, "text")
    _check(name, text_fault(text))
    pair = None
    if task.text_pair is not None:
        name, pair = _field(renamed, values, task.text_pair, "text_pair")
        _check(name, text_fault(pair, may_be_empty=True))
    elif values.get("text_pair") is not None:
        raise ValueError(f"field text_pair: task {task.id} has no text_pair")
    given = number
    if {task.row_id, "id"} & (renamed.keys() | values.keys()):
        name, given = _field(renamed, values, task.row_id or "id", "id")
        _check(name, id_fault(given) if given != "" else None)
    return given, Row(str(given), text, pair, label="", where=where)


def _check(name: str, fault: str | None) -> None:
    if fault is not None:
        raise ValueError(f"field {name}: {fault}")


def _field(renamed: Mapping[str, Any], values: Mapping[str, Any], name: str, plain: str) -> tuple[str, Any]:
    """Return the name and the value of a field in a line."""
    if name in renamed:
        return name, renamed[name]
    if plain in values:
        return plain, values[plain]
    also = "" if name == plain else f" (or {plain!r})"
    hint = did_you_mean(name, list(values)) if values else ""
    raise ValueError(f"field {name}{also} is missing{hint}")
