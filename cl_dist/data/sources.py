"""Raw records of a source, and the faults found while reading them.

Faults are collected, not raised, so that one look at the data names all of them.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.data.planted import THEMES, planted
from cl_dist.data.rows import SPLITS, Unit
from cl_dist.data.tasks import Source
from cl_dist.data.values import json_fields
from cl_dist.errors import DataError, printable
from cl_dist.places import resolve

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


def read(source: Source, faults: list[Fault]) -> Iterator[Record]:
    """Yield the records of a source in file order, adding to faults whatever could not be read.

    A `datasets` source with several splits yields them all, each record with its split's name in the column
    `split` (unless it has one), which is what `split: {by: field}` looks for. Names of classes stand for their
    numbers.
    """
    paths = {str(split): path for split, path in source.paths.items()}
    for split in SPLITS if paths else (None,):
        path = paths[split] if split else source.path
        try:
            yield from _read_path(source, split, path, faults)
        except FileNotFoundError:
            faults.append(Fault(path, None, None, "no such file; a relative path starts at the working directory"))
        except (DataError, OSError, EOFError, ValueError, zlib.error) as error:
            faults.append(Fault(path, None, None, str(error).removeprefix(f"{path}: ")))


def _read_path(source: Source, split: str | None, path: str, faults: list[Fault]) -> Iterator[Record]:
    prefix = f"{split}-" if split else ""
    if source.kind == "planted":
        if path not in THEMES:
            raise DataError(f"no such theme{did_you_mean(path, list(THEMES))}")
        for number, values in enumerate(planted(path)):
            yield Record(path, number, f"{prefix}{number}", split, values, unit="row")
        return
    if source.kind in ("parquet", "datasets"):
        for file, part, table in _tables(source, path):
            start = f"{part}-" if part else prefix
            for number, values in enumerate(_table_rows(table)):
                extra = {"split": part} if part else {}
                yield Record(file, number, f"{start}{number}", split, extra | values, unit="row")
        return

    def report(line: int | None, message: str) -> None:
        faults.append(Fault(path, line, None, message))

    lines = _lines(resolve(path), source.encoding, report)
    if source.kind == "jsonl":
        rows = _json_rows(lines, report)
    elif source.kind == "lines":
        rows = _pattern_rows(lines, re.compile(source.pattern or ""), report)
    else:
        rows = _csv_rows(lines, source.kind == "tsv", report)
    for number, (line, values) in enumerate(rows):
        yield Record(path, line, f"{prefix}{number}", split, values)


def _lines(path: Path, encoding: str, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, text with its line end) of a file, unpacking gzip; only a newline ends a line.

    Bytes that do not decode are reported with their offset in the (unpacked) file, and replaced to read on.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
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
    for number, text in lines:
        if not text.strip():
            continue
        try:
            values = json_fields(text)
        except ValueError as error:
            report(number, str(error))
        else:
            yield number, values


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


def _tables(source: Source, path: str) -> Iterator[tuple[str, str | None, Any]]:
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
    try:
        if source.kind == "parquet":
            found = datasets.Dataset(parquet.read_table(place))
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


def _table_rows(table: Any) -> Iterator[Values]:
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "names")}
    for row in table:
        for column, classes in names.items():
            number = row[column]
            row[column] = classes[number] if number is not None and number >= 0 else None  # -1: no label
        yield row
