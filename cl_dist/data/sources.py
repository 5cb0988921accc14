"""Readers of raw records, by kind of source.

Faults are collected, not raised, so that one pass over the data reports all of them.
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
from cl_dist.data.readers import read_with
from cl_dist.data.rows import SPLITS, Unit
from cl_dist.data.tasks import Source
from cl_dist.data.values import json_fields
from cl_dist.errors import DataError, printable
from cl_dist.formats import GZIP, head_of, not_text
from cl_dist.paths import resolve

Values = dict[str, Any]
Report = Callable[[int | None, str], None]

SHOWN = 20
"""Number of faults in an error message; `cl-dist data check` lists all."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A problem in the data for the user to fix."""

    file: str
    """Path as in the run file; with the split for a data set of several splits: `imdb[train]`."""
    line: int | None
    """1-based line of a text file, 0-based row of a table; None for a fault of the file."""
    field: str | None
    message: str
    unit: Unit = "line"

    def __str__(self) -> str:
        line = "" if self.line is None else f", {self.unit} {self.line}"
        field = "" if self.field is None else f", field {self.field}"
        return printable(f"{self.file}{line}{field}: {self.message}")


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record: column names to values, as in the file."""

    file: str
    line: int
    id: str
    """0-based number in the file, with the prefix `<split>-` if each split has its own file."""
    split: str | None
    """Split, if each split has its own file."""
    values: Values
    unit: Unit = "line"

    def fault(self, field: str | None, message: str) -> Fault:
        """Return a fault of this record."""
        return Fault(self.file, self.line, field, message, self.unit)


def listing(faults: Sequence[Fault], limit: int = SHOWN) -> str:
    """Return one indented line per fault, and the number of faults beyond the limit."""
    more = [f"... and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join(f"  {line}" for line in [*map(str, faults[:limit]), *more])


def read(source: Source, faults: list[Fault], wanted: Collection[str] | None = None) -> Iterator[Record]:
    """Yield the records of a source in file order; append what cannot be read to `faults`.

    A `datasets` source with several splits yields all of them, with the split's name in the column `split` (unless the
    data has one), for `split: {by: field}`. Class numbers are replaced by class names. Columns of a table that are not
    wanted are None: their types may have no Python values.
    """
    paths = {str(split): path for split, path in source.paths.items()}
    for split in (name for name in SPLITS if name in paths) if paths else (None,):
        path = paths[split] if split else source.path
        try:
            yield from _read_path(source, split, path, faults, wanted)
        except FileNotFoundError:
            faults.append(Fault(path, None, None, "no such file; a relative path starts at the working directory"))
        except IsADirectoryError:
            faults.append(Fault(path, None, None, f"is a directory; kind: {source.kind} expects a file"))
        except (DataError, OSError, EOFError, ValueError, zlib.error) as error:
            faults.append(Fault(path, None, None, str(error).removeprefix(f"{path}: ")))


def _read_path(
    source: Source, split: str | None, path: str, faults: list[Fault], wanted: Collection[str] | None
) -> Iterator[Record]:
    prefix = f"{split}-" if split else ""
    if source.kind == "planted":
        if path not in THEMES:
            raise DataError(f"unknown theme{did_you_mean(path, list(THEMES))}")
        for number, values in enumerate(planted(path)):
            yield Record(path, number, f"{prefix}{number}", split, values, unit="row")
        return
    if source.reader is not None:
        for number, values in enumerate(read_with(source.reader, path)):
            yield Record(path, number, f"{prefix}{number}", split, values, unit="row")
        return
    if source.kind in ("parquet", "datasets"):
        for file, part, table in _tables(source, path, wanted):
            start = f"{part}-" if part else prefix
            for number, values in enumerate(_table_rows(table, file, wanted)):
                extra = {"split": part} if part else {}
                yield Record(file, number, f"{start}{number}", split, extra | values, unit="row")
        return

    file_path = resolve(path)
    if (name := not_text(head_of(file_path))) is not None:
        raise DataError(f"this is {name}; kind: {source.kind} expects {_EXPECTED[source.kind]}")
    pending: list[tuple[int | None, str]] = []
    """Faults before the first row; if there are no rows, only the first one is reported."""
    number = -1

    def report(line: int | None, message: str) -> None:
        if number < 0:
            pending.append((line, message))
        else:
            faults.append(Fault(path, line, None, message))

    lines = _lines(file_path, source.encoding, report)
    if source.kind == "jsonl":
        rows = _json_rows(lines, report)
    elif source.kind == "lines":
        rows = _pattern_rows(lines, re.compile(source.pattern or ""), report)
    else:
        rows = _csv_rows(lines, source.kind == "tsv", report)
    for line, values in rows:
        number += 1
        if number == 0:
            faults += [Fault(path, at, None, message) for at, message in pending]
        yield Record(path, line, f"{prefix}{number}", split, values)
    if number < 0 and len(pending) > 1:
        at, message = pending[0]
        why = f"{message}; no line is valid: kind: {source.kind} expects {_EXPECTED[source.kind]}"
        faults.append(Fault(path, at, None, why))
    elif number < 0 and pending:
        faults.append(Fault(path, pending[0][0], None, pending[0][1]))
    elif number < 0 and not (split == "dev" and source.split.dev == 0):
        faults.append(Fault(path, None, None, f"has no rows; kind: {source.kind} expects {_EXPECTED[source.kind]}"))


_EXPECTED = {
    "jsonl": "one JSON object per line",
    "csv": "a header and cells separated by commas",
    "tsv": "a header and cells separated by tabs",
    "lines": "lines that source.pattern matches",
}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def _lines(path: Path, encoding: str, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, text with line end) of a file, decompressing gzip; only a newline ends a line.

    Bytes that cannot be decoded are reported with their offset in the (decompressed) file, and replaced.
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
    opened: tuple[int, str] | None = None  # the fault of a first line that looks incomplete
    seen = False
    for number, text in lines:
        bare = text.strip()
        if not bare:
            continue
        if not seen and bare[0] == "[":
            report(number, "a JSON array, not JSON lines; write one object per line, as `jq -c '.[]'` does")
            return
        try:
            values = json_fields(text)
        except ValueError as error:
            if opened is not None:
                report(opened[0], "a JSON document over several lines; write one object per line, as `jq -c .` does")
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
            report(number, f"the line does not match source.pattern: {shown!r}")


def _csv_rows(lines: Iterator[tuple[int, str]], tabs: bool, report: Report) -> Iterator[tuple[int, Values]]:
    """Yield rows as mappings from the header. Quotes in tab-separated files are text, as in most real data.

    Quotes in CSV are parsed strictly: a lenient reader silently reads everything after an open quote as one cell.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may be an entire document
    texts = (text for _, text in lines)
    rules: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(texts, **rules)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # quoted cells may contain line ends: report the first line of a row
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            hint = "" if tabs else "; check for a quote that is not closed, or not doubled inside quotes"
            report(line, f"not readable: {error}{hint}")
            if header is None:
                return
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if (why := _header_fault(cells, tabs)) is not None:
                report(line, why)
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                report(line, f"the header has {', '.join(map(repr, twice))} more than once")
                return
        elif len(cells) != len(header):
            report(line, f"expected {len(header)} cells as in the header, got {len(cells)}")
        else:
            yield line, dict(zip(header, cells, strict=True))
    if header is None:
        report(None, "is empty; expected a header line with the names of the columns")


def _header_fault(cells: list[str], tabs: bool) -> str | None:
    """Return the fault of a header line, if it is not one of this kind."""
    line = cells[0].strip() if len(cells) == 1 else ""
    if re.fullmatch(r"sep=.?", line, re.IGNORECASE) or [cell.lower() for cell in cells] == ["sep=", ""]:
        return "this line is an Excel directive, not a header; remove it"
    other = "," if tabs else "\t"
    for mark in dict.fromkeys((other, *_SEPARATORS)):
        if mark in line:
            kind = "csv" if tabs else "tsv"
            remedy = f"set kind: {kind}" if mark == other else f"convert it to {'tabs' if tabs else 'commas'}"
            return f"the header is one cell, {line!r:.100}: cells seem to be separated by {_SEPARATORS[mark]}; {remedy}"
    return None


def parquet_columns(path: str) -> list[str]:
    """Return the columns of a parquet file whose types `read` supports.

    Raises:
        DataError: If it is not a parquet file.
    """
    ((_, _, table),) = _tables(Source(kind="parquet", path=path), path, None)
    names = []
    for field in table.schema:
        try:
            _check_type(field)
        except DataError:
            continue
        names.append(field.name)
    return names


def _tables(source: Source, path: str, wanted: Collection[str] | None) -> Iterator[tuple[str, str | None, Any]]:
    """Yield (file, split, table) of a parquet file, a folder written by `save_to_disk`, or a data set on the hub."""
    import datasets  # takes half a second, so only imported here
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from pyarrow import parquet

    file_path = resolve(path)
    sets = "a folder written by save_to_disk, or a data set on the hub"
    if source.kind == "datasets" and not file_path.is_dir():
        if path in _PACKAGED_DATASETS_MODULES:  # reads all files of this format below the working directory
            raise DataError(f"expected {sets}, not a format name; for files set their kind, such as jsonl")
        if file_path.suffix == ".py" or file_path.is_file():
            raise DataError(f"expected {sets}, not a file; data set scripts are not supported")
    if source.kind == "parquet" and file_path.is_file() and not (head := head_of(file_path)).startswith(b"PAR1"):
        raise DataError(f"expected a parquet file, but this is {not_text(head) or ('text' if head else 'empty')}")
    try:
        if source.kind == "parquet":
            found = parquet.ParquetDataset(file_path)
        elif file_path.is_dir():
            found = datasets.load_from_disk(str(file_path))
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
        raise DataError(f"has the splits {', '.join(found)}; set it as `path`, with split: {{by: field}}")
    for name, table in found.items():
        yield f"{path}[{name}]", str(name), table


def _table_rows(table: Any, file: str, wanted: Collection[str] | None) -> Iterator[Values]:
    """Yield the rows of a parquet file or data set; columns that are not wanted are None."""
    import datasets
    import pyarrow

    is_set = isinstance(table, datasets.Dataset)
    known = table.column_names if is_set else table.schema.names
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise DataError(f"{', '.join(map(repr, twice))} is the name of several columns")
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
    empty = dict.fromkeys(known)
    for row in table:
        for column, classes in names.items():
            number = row[column]
            row[column] = classes[number] if number is not None and number >= 0 else None  # -1: no label
        yield empty | row


def _check_type(column: Any) -> None:
    """Raise DataError if a parquet column has a type that `datasets` does not support."""
    import datasets
    import pyarrow

    try:
        datasets.Features.from_arrow_schema(pyarrow.schema([column]))
    except (ValueError, TypeError, NotImplementedError, LookupError, pyarrow.ArrowException):
        raise DataError(
            f"column {column.name!r} has the type {column.type}, which is neither text nor a label"
        ) from None
