"""Guesses of a task's settings from its files: format, columns of text, label, id and split."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from cl_dist.config import Tree, did_you_mean, parse
from cl_dist.data.sources import Fault, Record, listing, parquet_columns, read
from cl_dist.data.tasks import Source
from cl_dist.data.values import label_fault, word
from cl_dist.errors import DataError

KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""Kind of source by the ending of a file, which `.gz` may follow."""
SPLITS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "valid": "dev",
    "val": "dev",
    "validation": "dev",
    "test": "test",
    "testing": "test",
}
"""Names of splits, in files and columns, in lower case."""
TEXTS = ("text", "sentence", "message", "review", "body", "content", "tweet", "comment", "description", "document")
PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "text": "text_pair"}
"""First text -> second text."""
SECOND = ("text_pair", "aspect")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "queue", "tag", "y")
IDS = ("id", "row_id", "uid", "guid", "uuid", "idx", "index")
SPLIT_COLUMNS = ("split", "set", "partition", "fold", "subset")
ROWS = 20_000
"""Rows of each file that are looked at."""
MAX_LABELS = 200
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one task."""

    task: str
    paths: Mapping[str, Path]
    """By split; with the key "" for one file that holds all splits."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Columns that the user has named."""

    text: str | None = None
    label: str | None = None
    id: str | None = None
    split: str | None = None


@dataclass(slots=True)
class Column:
    """One column of a task's files."""

    name: str
    rows: int
    """Rows that have a value."""
    distinct: int
    shown: str
    """Its values, shortened for a table."""
    use: str = ""
    """text, text_pair, label, row_id, split or nothing."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Guess:
    """What a task's files look like."""

    task: Tree
    """A task of a run file."""
    columns: list[Column]
    notes: dict[str, str]
    """Reasons, by the key of the task that they explain."""
    rows: int
    tokens: int
    """Estimated tokens below which nineteen texts of twenty stay."""
    more: bool
    """Whether there are rows that were not looked at."""


def find_files(paths: Sequence[Path]) -> list[Files]:
    """Group files into tasks: a file is a task, and so is a folder of files train, dev and test.

    Raises:
        DataError: If a path does not exist, has an unknown ending, or a folder has no data files.
    """
    found: list[tuple[str, dict[str, Path]]] = []
    alone: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        if path.is_dir():
            found += _in_folder(path)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif _ending(path) not in KINDS:
            raise DataError(f"{path}: expected a file that ends in {', '.join(KINDS)} (and .gz), or a folder of them")
        else:
            alone.setdefault(path.parent, []).append(path)
    for folder, files in alone.items():
        found += _tasks_of(files, folder)
    tasks, taken = list[Files](), set[str]()
    for name, splits in found:
        task = _task_id(name, len(tasks))
        if task in taken:
            task = next(f"{task[:60]}-{n}" for n in range(2, len(found) + 2) if f"{task[:60]}-{n}" not in taken)
        taken.add(task)
        tasks.append(Files(task, splits))
    return tasks


def _in_folder(folder: Path) -> list[tuple[str, dict[str, Path]]]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    files = [path for path in entries if path.is_file() and _ending(path) in KINDS]
    found = _tasks_of(files, folder)
    for inner in (path for path in entries if path.is_dir()):
        known = [path for path in sorted(inner.iterdir()) if path.is_file() and _ending(path) in KINDS]
        if _as_splits(known):
            found += _tasks_of(known, inner)
    if not found:
        listed = ", ".join(path.name for path in entries[:8]) or "nothing"
        raise DataError(
            f"{folder}: no data files in this folder; expected {', '.join(KINDS)} (and .gz), found {listed}"
        )
    return found


def _tasks_of(files: Sequence[Path], folder: Path) -> list[tuple[str, dict[str, Path]]]:
    """Return the tasks of the data files of one folder."""
    if (splits := _as_splits(files)) is not None:
        return [(folder.resolve().name, splits)]
    return [(_stem(path), {"": path}) for path in files]


def _as_splits(files: Sequence[Path]) -> dict[str, Path] | None:
    """Return files by split if they are named after distinct splits, among them train and test."""
    named = [(SPLITS.get(_stem(path).lower()), path) for path in files]
    splits = {name: path for name, path in named if name is not None}
    return splits if len(splits) == len(files) and {"train", "test"} <= splits.keys() else None


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _task_id(name: str, number: int) -> str:
    """Return the id of a task for a file: its name in ASCII."""
    ascii_name = normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", ascii_name).strip("-_.")[:64] or f"task{number + 1}"


def guess(files: Files, asked: Asked, *, free_text: bool = False) -> Guess:
    """Look at a task's files and guess its settings.

    Args:
        files: The files.
        asked: Columns that the user has named.
        free_text: Whether a label column with many values holds free-text answers.

    Raises:
        DataError: If the files cannot be read, or a column cannot be found; the message names the columns and the
            option that sets it.
    """
    source, records, more = _read(files)
    where = ", ".join(map(str, files.paths.values()))
    names = list(dict.fromkeys(name for record in records for name in record.values))
    columns = {name: _column(name, records) for name in names}
    seen = f"columns: {', '.join(names)}"
    for option, name in (("text", asked.text), ("label", asked.label), ("id", asked.id), ("split", asked.split)):
        if name is not None and name not in columns:
            raise DataError(f"{where}: --{option} {name!r}: no such column{did_you_mean(name, names)}")

    task: Tree = {"id": files.task, "source": source}
    notes: dict[str, str] = {}
    is_split_by_file = "" not in files.paths
    if not is_split_by_file:
        _guess_split(records, columns, asked, source, notes, where)
    _guess_id(records, columns, asked, task, where)
    _guess_label(records, columns, asked, task, notes, where, seen, free_text=free_text)
    _guess_text(records, columns, asked, task, where, seen)
    text, pair = task.get("text", "text"), task.get("text_pair", "")
    keys = Counter((_folded(r.values.get(text)), _folded(r.values.get(pair))) for r in records)
    if copies := len(records) - len(keys):
        source["dedupe"] = True
        notes["dedupe"] = f"{copies} of {len(records)} rows repeat the text of another"
    lengths = sorted(_tokens(f"{r.values.get(text)}{r.values.get(pair) or ''}") for r in records)
    return Guess(task, list(columns.values()), notes, len(records), lengths[int(0.95 * (len(lengths) - 1))], more)


def _tokens(text: str) -> int:
    """Return an estimate of a text's tokens: one for 3.5 characters of ASCII, and for each of another script."""
    num_ascii = sum(map(str.isascii, text))
    return math.ceil(num_ascii / 3.5) + len(text) - num_ascii


def _read(files: Files) -> tuple[Tree, list[Record], bool]:
    """Return the source of some files, their first records, and whether there are more.

    Raises:
        DataError: If they cannot be read.
    """
    kinds = {KINDS[_ending(path)] for path in files.paths.values()}
    if len(kinds) > 1:
        raise DataError(
            f"task {files.task}: its splits have different formats: {', '.join(map(str, files.paths.values()))}"
        )
    (kind,) = kinds
    other = {"csv": "tsv", "tsv": "csv"}.get(kind)
    first: list[Fault] = []
    for each in filter(None, (kind, other)):
        for encoding in ("utf-8", "cp1252"):
            source: Tree = {"kind": each}
            if "" in files.paths:
                source["path"] = str(files.paths[""])
            else:
                source["paths"] = {
                    split: str(files.paths[split]) for split in ("train", "dev", "test") if split in files.paths
                }
                source["split"] = {"by": "files"} | ({} if "dev" in files.paths else {"dev": 0})
            if encoding != "utf-8":
                source["encoding"] = encoding
            records, faults, more = _records(parse(Source, source))
            first = first or faults
            if not any(fault.message.startswith("not utf-8") for fault in faults):
                break
        if records:
            return source, records, more
    raise DataError(f"task {files.task}: no row can be read\n{listing(first, 3)}")


def _records(source: Source) -> tuple[list[Record], list[Fault], bool]:
    faults: list[Fault] = []
    wanted = None
    if source.kind == "parquet":
        wanted = [name for path in (source.path, *source.paths.values()) if path for name in parquet_columns(path)]
    records: list[Record] = []
    more = False
    for split, path in dict(source.paths).items() or [(None, source.path)]:
        part = source if split is None else Source(kind=source.kind, path=path, encoding=source.encoding)
        rows = read(part, faults, wanted)
        records += islice(rows, ROWS)
        more = more or next(rows, None) is not None
    return records, faults, more


def _column(name: str, records: Sequence[Record]) -> Column:
    values = [value for record in records if (value := record.values.get(name)) is not None and value != ""]
    words = Counter(found for value in values if (found := word(value)) is not None)
    if len(words) < len(values) and sum(words.values()) < len(values):
        kind = next(type(value).__name__ for value in values if word(value) is None)
        return Column(name, len(values), 0, f"{kind} values", why="neither text nor labels")
    if len(words) == 1 or (len(words) <= 12 and len(words) * 2 <= len(values)):
        shown = ", ".join(f"{_short(found)} ({count})" for found, count in words.most_common(SHOWN))
        shown += f", ... ({len(words)} values)" if len(words) > SHOWN else ""
    else:
        shown = f"{len(words)} values: {_short(next(iter(words)), 40)}" if words else "empty"
    return Column(name, len(values), len(words), shown)


def _short(text: str, limit: int = 20) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _folded(value: Any) -> str:
    return str(value).strip().casefold()


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [record.values.get(name) for record in records]


def _named(names: Sequence[str], columns: Mapping[str, Column]) -> list[str]:
    """Return the unused columns with one of these names, in the order of the names; case does not matter."""
    return [column for name in names for column in columns if column.lower() == name and not columns[column].use]


def _guess_split(
    records: Sequence[Record],
    columns: Mapping[str, Column],
    asked: Asked,
    source: Tree,
    notes: dict[str, str],
    where: str,
) -> None:
    for name in [asked.split] if asked.split is not None else _named(SPLIT_COLUMNS, columns):
        assert name is not None
        given = {word(value) for value in _values(records, name)}
        known = {value: SPLITS.get(value.lower()) for value in given if value is not None}
        if None in given or None in known.values() or "train" not in known.values() or len(set(known.values())) < 2:
            if asked.split is not None:
                raise DataError(
                    f"{where}: --split {name!r}: expected the names train, dev and test in this column, "
                    f"got {columns[name].shown}"
                )
            continue
        names = {value: split for value, split in known.items() if value != split}
        split: Tree = {"by": "field"} | ({} if name == "split" else {"field": name})
        if "test" not in known.values():
            names |= {str(value): "test" for value, split in known.items() if split == "dev"}
            notes["split"] = "the data have no test rows: their dev rows serve as test rows"
        if "dev" not in known.values() or "test" not in known.values():
            split["dev"] = 0
        source["split"] = split | ({"names": names} if names else {})
        columns[name].use, columns[name].why = "split", "names of splits"
        return


def _guess_id(records: Sequence[Record], columns: Mapping[str, Column], asked: Asked, task: Tree, where: str) -> None:
    for name in [asked.id] if asked.id is not None else _named(IDS, columns):
        assert name is not None
        ids = [
            (record.split, record.file, value) for record in records if (value := record.values.get(name)) is not None
        ]
        plain = [each for each in ids if isinstance(each[2], str | int) and each[2] != ""]
        if len(plain) == len(records) == len({(split, file, str(value)) for split, file, value in plain}):
            task["row_id"] = name
            columns[name].use, columns[name].why = "row_id", "a different value in every row"
            return
        if asked.id is not None:
            raise DataError(
                f"{where}: --id {name!r}: expected a different value in every row, got {columns[name].shown}"
            )
        columns[name].why = "not an id: values are missing or repeated"


def _guess_label(
    records: Sequence[Record],
    columns: Mapping[str, Column],
    asked: Asked,
    task: Tree,
    notes: dict[str, str],
    where: str,
    seen: str,
    *,
    free_text: bool,
) -> None:
    limit = min(MAX_LABELS, max(2, len(records) // 4))

    def fits(column: Column) -> bool:
        return 2 <= column.distinct <= limit and column.rows >= 0.9 * len(records)

    if asked.label is not None:
        name = asked.label
    elif named := _named(LABELS, columns):
        name = next((each for each in named if fits(columns[each])), named[0])
        columns[name].why = "its name"
    else:
        texts = _named([*TEXTS, *PAIRS, *SECOND], columns)
        fitting = [each for each in columns.values() if fits(each) and not each.use and each.name not in texts]
        if len(fitting) != 1:
            found = ", ".join(f"{each.name} ({each.distinct} values)" for each in fitting)
            why = f"several columns may be the label: {found}" if fitting else "no column looks like a label"
            raise DataError(f"{where}: {why}; name it with --label COLUMN ({seen})")
        name = fitting[0].name
        columns[name].why = f"few values: {columns[name].distinct} in {len(records)} rows"
    column = columns[name]
    if column.distinct == 1:
        raise DataError(
            f"{where}: column {name!r}: all rows have the label {column.shown}; a task needs two labels or more: "
            f"name another column with --label COLUMN ({seen})"
        )
    if column.distinct == 0:
        faults = (label_fault(value) for value in _values(records, name))
        fault = next((each for each in faults if each is not None), "is empty")
        raise DataError(f"{where}: column {name!r} {fault}; name the label with --label COLUMN ({seen})")
    if column.distinct > limit:
        if not free_text:
            raise DataError(
                f"{where}: column {name!r} has {column.distinct} values in {len(records)} rows, too many for labels; "
                f"name another one with --label COLUMN, convert numbers with source.label_thresholds in a run file, or "
                f"take it as free text with --output lm ({seen})"
            )
        task |= {"output": "text", "metric": "f1"}
        notes["output"] = f"{column.distinct} different answers: free text, scored by the overlap of words"
    if name != "label":
        task["label"] = name
    column.use, column.why = "label", column.why or "as asked"


def _guess_text(
    records: Sequence[Record], columns: Mapping[str, Column], asked: Asked, task: Tree, where: str, seen: str
) -> None:
    def length(name: str) -> float:
        texts = [value for value in _values(records, name) if isinstance(value, str)]
        return sum(map(len, texts)) / len(texts) if len(texts) >= 0.9 * len(records) else 0.0

    free = {name: length(name) for name, column in columns.items() if not column.use}
    texts = {name: mean for name, mean in free.items() if mean > 0}
    if asked.text is not None:
        if columns[asked.text].use:
            raise DataError(f"{where}: --text {asked.text!r} is also the column of {columns[asked.text].use}")
        name, why = asked.text, "as asked"
    elif not texts:
        raise DataError(f"{where}: no column of text; name it with --text COLUMN ({seen})")
    elif named := [each for each in _named([*TEXTS, *PAIRS], columns) if each in texts]:
        name, why = named[0], "its name"
    else:
        name = max(texts, key=texts.__getitem__)
        why = f"longest texts ({texts[name]:.0f} characters)"
    if name != "text":
        task["text"] = name
    columns[name].use, columns[name].why = "text", why
    second = [PAIRS[name.lower()]] if name.lower() in PAIRS else []
    for pair in _named([*second, *SECOND], columns):
        if pair in texts:
            task["text_pair"] = pair
            columns[pair].use, columns[pair].why = "text_pair", "its name"
            return
