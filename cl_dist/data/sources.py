"""Raw records of a source, and the faults found while reading them.

Faults are collected, not raised, so that one look at the data names all of them.
"""

import csv
import gzip
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.data.planted import THEMES, planted
from cl_dist.data.rows import SPLITS, Unit
from cl_dist.data.tasks import Source
from cl_dist.data.values import json_fields
from cl_dist.errors import DataError, printable
from cl_dist.formats import GZIP, head_of, not_text
from cl_dist.paths import resolve

Values = dict[str, Any]
Report = Callable[[int | None, str], None]

SHOWN = 20
"""Faults that an error message lists; `cl-dist data check` can list them all."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in the data that a person has to put right."""

    file: str
    """The path as the run file names it; of a set with several splits, with the split: `imdb[train]`."""
    line: int | None
    """1-based line of a text file, 0-based row of a table; None where the fault is the file's."""
    field: str | None
    message: str
    unit: Unit = "line"

    def __str__(self) -> str:
        line = "" if self.line is None else f", {self.unit} {self.line}"
        field = "" if self.field is None else f", field {self.field}"
        return printable(f"{self.file}{line}{field}: {self.message}")


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record: column names to values, as the file holds them."""

    file: str
    line: int
    id: str
    """Its 0-based number in the file, after `<split>-` where each split has a file of its own."""
    split: str | None
    """The split, where each split has a file of its own."""
    values: Values
    unit: Unit = "line"

    def fault(self, field: str | None, message: str) -> Fault:
        """Return a fault of this record."""
        return Fault(self.file, self.line, field, message, self.unit)


def listing(faults: Sequence[Fault], limit: int = SHOWN) -> str:
    """Return one indented line per fault, and how many more there are beyond the limit."""
    more = [f"... and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join(f"  {line}" for line in [*map(str, faults[:limit]), *more])


def read(source: Source, faults: list[Fault], wanted: Collection[str] | None = None) -> Iterator[Record]:
    """Yield the records of a source in file order, adding to faults whatever could not be read.

    A `datasets` source with several splits yields them all, each record with its split's name in the column
    `split` (unless it has one), which is what `split: {by: field}` looks for. Names of classes stand for their
    numbers. Of a table only the wanted columns are read: the others may be of types that Python has no values for, and
    are None.
    """
    paths = {str(split): path for split, path in source.paths.items()}
    for split in SPLITS if paths else (None,):
        path = paths[split] if split else source.path
        try:
            yield from _read_path(source, split, path, faults, wanted)
        except FileNotFoundError:
            faults.append(Fault(path, None, None, "no such file; a relative path starts at the working directory"))
        except IsADirectoryError:
            faults.append(Fault(path, None, None, f"is a folder; kind: {source.kind} expects a file"))
        except (DataError, OSError, EOFError, ValueError, zlib.error) as error:
            faults.append(Fault(path, None, None, str(error).removeprefix(f"{path}: ")))


def _read_path(
    source: Source, split: str | None, path: str, faults: list[Fault], wanted: Collection[str] | None
) -> Iterator[Record]:
    prefix = f"{split}-" if split else ""
    if source.kind == "planted":
        if path not in THEMES:
            raise DataError(f"no such theme{did_you_mean(path, list(THEMES))}")
        for number, values in enumerate(planted(path)):
            yield Record(path, number, f"{prefix}{number}", split, values, unit="row")
        return
    if source.kind in ("parquet", "datasets"):
        for file, part, table in _tables(source, path, wanted):
            start = f"{part}-" if part else prefix
            for number, values in enumerate(_table_rows(table, file, wanted)):
                extra = {"split": part} if part else {}
                yield Record(file, number, f"{start}{number}", split, extra | values, unit="row")
        return

    place = resolve(path)
    if (name := not_text(head_of(place))) is not None:
        raise DataError(f"this is {name}; kind: {source.kind} expects {_EXPECTED[source.kind]}")
    held: list[tuple[int | None, str]] = []
    """Faults before the first row: where no row comes, the first stands for all."""
    number = -1

    def report(line: int | None, message: str) -> None:
        if number < 0:
            held.append((line, message))
        else:
            faults.append(Fault(path, line, None, message))

    lines = _lines(place, source.encoding, report)
    if source.kind == "jsonl":
        rows = _json_rows(lines, report)
    elif source.kind == "lines":
        rows = _pattern_rows(lines, re.compile(source.pattern or ""), report)
    else:
        rows = _csv_rows(lines, source.kind == "tsv", report)
    for line, values in rows:
        number += 1
        if number == 0:
            faults += [Fault(path, at, None, message) for at, message in held]
        yield Record(path, line, f"{prefix}{number}", split, values)
    if number < 0 and len(held) > 1:
        at, message = held[0]
        why = f"{message}; no line can be used: kind: {source.kind} expects {_EXPECTED[source.kind]}"
        faults.append(Fault(path, at, None, why))
    elif number < 0 and held:
        faults.append(Fault(path, held[0][0], None, held[0][1]))
    elif number < 0 and not (split == "dev" and source.split.dev == 0):
        faults.append(Fault(path, None, None, f"has no rows; kind: {source.kind} expects {_EXPECTED[source.kind]}"))


_EXPECTED = {
    "jsonl": "one JSON object a line",
    "csv": "a header and cells, apart by commas",
    "tsv": "a header and cells, apart by tabs",
    "lines": "lines that source.pattern matches",
}
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def _lines(path: Path, encoding: str, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, text with its line end) of a file, unpacking gzip; only a newline ends a line.

    Bytes that do not decode are reported with their offset in the (unpacked) file, and replaced to read on.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        offset = 0
        for number, data in enumerate(gzip.GzipFile(fileobj=raw) if packed else raw, start=1):
            try:
                text = data.decode(encoding)
            except UnicodeDecodeError as error:
                byte = f"byte 0x{data[error.start]:02x} at offset {offset + error.start} of the file"
                report(number, f"not {encoding}: {byte}; save it as UTF-8, or set source.encoding (cp1252?)")
                text = data.decode(encoding, errors="replace")
            offset += len(data)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _json_rows(lines: Iterator[tuple[int, str]], report: Report) -> Iterator[tuple[int, Values]]:
    opened: tuple[int, str] | None = None  # the fault of a first line that is not at an end
    seen = False
    for number, text in lines:
        bare = text.strip()
        if not bare:
            continue
        if not seen and bare[0] == "[":
            report(number, "a JSON array, not JSON lines; write an object a line, as `jq -c '.[]'` does")
            return
        try:
            values = json_fields(text)
        except ValueError as error:
            if opened is not None:
                report(opened[0], "a JSON document over several lines; write an object a line, as `jq -c .` does")
                return
            if not seen and bare[-1] in "{[,":
                opened = number, str(error)
            else:
                report(number, str(error))
        else:
            if opened is not None:
                report(*opened)
                opened = None
            yield number, values
        seen = True
    if opened is not None:
        report(*opened)


def _pattern_rows(
    lines: Iterator[tuple[int, str]], pattern: re.Pattern[str], report: Report
) -> Iterator[tuple[int, Values]]:
    for number, text in lines:
        line = text.rstrip("\r\n")
        if not line.strip():
            continue
        if match := pattern.fullmatch(line):
            yield number, match.groupdict()
        else:
            shown = line if len(line) <= 60 else f"{line[:60]}..."
            report(number, f"the whole line does not match source.pattern: {shown!r}")


def _csv_rows(lines: Iterator[tuple[int, str]], tabs: bool, report: Report) -> Iterator[tuple[int, Values]]:
    """Yield rows named by the header. Tab-separated files have no quoting: in real data their quotes are text.

    Quotes are read strictly: a lenient reader takes all that follows an open one for a cell, and says nothing.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    texts = (text for _, text in lines)
    rules: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(texts, **rules)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # a quoted cell may hold line ends: a row is named by its first line
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            hint = "" if tabs else "; is a quote left open, or not doubled inside quotes?"
            report(line, f"not readable: {error}{hint}")
            if header is None:
                return
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if (why := _no_header(cells, tabs)) is not None:
                report(line, why)
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                report(line, f"the header names {', '.join(map(repr, twice))} more than once")
                return
        elif len(cells) != len(header):
            report(line, f"expected {len(header)} cells as in the header, got {len(cells)}")
        else:
            yield line, dict(zip(header, cells, strict=True))
    if header is None:
        report(None, "is empty; expected a header line with the names of the columns")


def _no_header(cells: list[str], tabs: bool) -> str | None:
    """Return what a first line is, where it is no header of this kind."""
    line = cells[0].strip() if len(cells) == 1 else ""
    if re.fullmatch(r"sep=.?", line, re.IGNORECASE) or [cell.lower() for cell in cells] == ["sep=", ""]:
        return "this line is a note for Excel, and no header; remove it"
    other = "," if tabs else "\t"
    for mark in dict.fromkeys((other, *_OTHER_MARKS)):
        if mark in line:
            kind = "csv" if tabs else "tsv"
            remedy = f"set kind: {kind}" if mark == other else f"write it with {'tabs' if tabs else 'commas'}"
            return f"the header is one cell, {line!r:.100}: cells seem to be apart by {_OTHER_MARKS[mark]}; {remedy}"
    return None


def _tables(source: Source, path: str, wanted: Collection[str] | None) -> Iterator[tuple[str, str | None, Any]]:
    """Yield (file, split, table) of a parquet file, a folder written by `save_to_disk`, or a set on the hub."""
    import datasets  # half a second that other kinds of source do not need
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from pyarrow import parquet

    place = resolve(path)
    sets = "a folder written by save_to_disk, or a set on the hub"
    if source.kind == "datasets" and not place.is_dir():
        if path in _PACKAGED_DATASETS_MODULES:  # it would read all files of this format below the working directory
            raise DataError(f"expected {sets}, not the name of a format; files have a kind of their own, such as jsonl")
        if place.suffix == ".py" or place.is_file():
            raise DataError(f"expected {sets}, not a file; scripts are never run")
    if source.kind == "parquet" and place.is_file() and not (head := head_of(place)).startswith(b"PAR1"):
        raise DataError(f"expected a parquet file, and this is {not_text(head) or ('text' if head else 'empty')}")
    try:
        if source.kind == "parquet":
            found = parquet.ParquetDataset(place)
        elif place.is_dir():
            found = datasets.load_from_disk(str(place))
        else:
            found = datasets.load_dataset(path, name=source.config, revision=source.revision)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if source.kind == "parquet" and isinstance(error, FileNotFoundError):
            raise
        expected = "a parquet file" if source.kind == "parquet" else sets
        raise DataError(f"expected {expected}: {error}") from error
    if not isinstance(found, Mapping):
        yield path, None, found
        return
    if source.split.by == "files":
        raise DataError(f"holds the splits {', '.join(found)}; name it as `path`, with split: {{by: field}}")
    for name, table in found.items():
        yield f"{path}[{name}]", str(name), table


def _table_rows(table: Any, file: str, wanted: Collection[str] | None) -> Iterator[Values]:
    """Yield the rows of a parquet file or a data set; columns that are not wanted are None."""
    import datasets
    import pyarrow

    is_set = isinstance(table, datasets.Dataset)
    known = table.column_names if is_set else table.schema.names
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise DataError(f"{', '.join(map(repr, twice))} names more than one column")
    chosen = [name for name in known if wanted is None or name in wanted]
    if is_set:
        table = table.select_columns(chosen)
    else:
        for name in chosen:
            _check_type(table.schema.field(name))
        try:
            table = datasets.Dataset(table.read(columns=chosen))
        except (pyarrow.ArrowException, RuntimeError, TypeError) as error:
            raise DataError(f"expected a parquet file: {error}") from error
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "names")}
    unread = dict.fromkeys(known)
    for row in table:
        for column, classes in names.items():
            number = row[column]
            row[column] = classes[number] if number is not None and number >= 0 else None  # -1: no label
        yield unread | row


def _check_type(column: Any) -> None:
    """Raise DataError unless the values of a column of parquet can be read."""
    import datasets
    import pyarrow

    try:
        datasets.Features.from_arrow_schema(pyarrow.schema([column]))
    except (ValueError, TypeError, NotImplementedError, LookupError, pyarrow.ArrowException):
        raise DataError(f"column {column.name!r} is of the type {column.type}, which is no text and no label") from None
