"""Checked rows of a task as Arrow files, memory-mapped by any number of processes.

The driver parses and checks raw files once and publishes the rows in the run folder; workers map them, so a rank starts
in constant memory, whatever the number of rows. `datasets.Dataset.from_file` can open the files.

    rows/TASK-KEY/  task.json  train.arrow  dev.arrow  test.arrow

KEY is a digest of the task's settings and of the bytes of its raw files, wherever they are: a changed file is read and
checked again.
"""

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, overload

import pyarrow as pa

from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import CheckpointError
from cl_dist.ledger import sha256, write_text
from cl_dist.paths import resolve
from cl_dist.stage import digest_of

HEADER = "task.json"
FORMAT = 2
"""Incremented when the file format or the checks change, which causes older files to be rewritten."""
_BATCH = 4096
_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("text", pa.large_string()),
        ("text_pair", pa.large_string()),
        ("label", pa.large_string()),
        ("rationale", pa.list_(pa.list_(pa.int64()))),
        ("environment", pa.large_string()),
        ("file", pa.large_string()),
        ("line", pa.int64()),
        ("unit", pa.large_string()),
    ]
)


class MappedRows(Sequence[Row]):
    """Rows of one split, read lazily from a memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return list(pa.ipc.open_stream(pa.memory_map(str(self.path))))

    @cached_property
    def _ends(self) -> list[int]:
        """Number of rows up to and including each batch."""
        return list(accumulate(len(batch) for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        """Return a row, or a tuple of rows for a slice."""
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, number)
        return _row(self._batches[at].slice(number - (self._ends[at - 1] if at else 0), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for batch in self._batches:
            yield from map(_row, batch.to_pylist())

    def column(self, name: str) -> list[Any]:
        """Return one column of all rows."""
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Row.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(self.path)

    def __reduce__(self) -> tuple[type["MappedRows"], tuple[Path]]:
        return MappedRows, (self.path,)


def source_key(task: TaskConfig, data: DataConfig) -> str | None:
    """Return the digest of a task's settings and raw files, or None for rows that are read again at every start.

    These are the rows of readers and hub data sets, and of files that are missing.
    """
    source = task.source
    settings = [task.model_dump(mode="json", exclude={"train"}), data.model_dump(mode="json")]
    if source.kind == "planted":
        return digest_of([FORMAT, settings])
    if source.kind == "reader":  # its code may change, and its path may not be a file
        return None
    files: dict[str, Any] = {}
    for split, path in {str(split): path for split, path in source.paths.items()}.items() or [("", source.path)]:
        try:
            found = resolve(path)
            parts = sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
            files[split] = [[str(p.relative_to(found)), sha256(p)] for p in parts]
        except (OSError, ValueError):
            return None
    settings[0]["source"] |= {"path": "", "paths": {}}  # rows stay the same where files are moved
    return digest_of([FORMAT, settings, files])


def publish(loaded: TaskData, folder: Path) -> None:
    """Write the rows of a task to a folder, which appears by one rename; do nothing if it exists.

    Raises:
        OSError: If the folder cannot be written.
    """
    if (folder / HEADER).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o755)
        digests = {}
        for split in SPLITS:
            path = made / f"{split}.arrow"
            _write(path, loaded.rows(split))
            digests[split] = sha256(path)
        header = {
            "id": loaded.id,
            "labels": loaded.labels,
            "question": loaded.question,
            "digests": loaded.digests,
            "overlap": loaded.overlap,
            "warnings": loaded.warnings,
            "files": digests,
        }
        write_text(made / HEADER, json.dumps(header, indent=1))
        if folder.exists():
            shutil.rmtree(folder)  # an incomplete attempt, without a header
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def published(folder: Path, *, verify: bool = False) -> TaskData:
    """Return the memory-mapped rows of a task.

    Args:
        folder: Folder written by `publish`.
        verify: Whether to compare the files with their digests.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf8"))
        for split, digest in header["files"].items():
            path = folder / f"{split}.arrow"
            if verify and sha256(path) != digest:
                raise ValueError(f"{path.name} does not match its digest in {HEADER}")
        train, dev, test = (MappedRows(folder / f"{split}.arrow") for split in SPLITS)
        for rows in (train, dev, test):
            len(rows)  # maps the file
        return TaskData(
            id=header["id"],
            labels=tuple(header["labels"]),
            question=header["question"],
            train=train,
            dev=dev,
            test=test,
            digests=header["digests"],
            overlap=header["overlap"],
            warnings=tuple(header["warnings"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{folder}: published rows are missing or damaged: {error}; remove this folder and resume"
        ) from error


def _write(path: Path, rows: Iterable[Row]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(_columns(row))
            if len(batch) == _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))


def _columns(row: Row) -> dict[str, Any]:
    where = row.where
    return {
        "id": row.id,
        "text": row.text,
        "text_pair": row.text_pair,
        "label": row.label,
        "rationale": row.rationale,
        "environment": row.environment,
        "file": None if where is None else where.file,
        "line": None if where is None else where.line,
        "unit": None if where is None else where.unit,
    }


def _row(values: dict[str, Any]) -> Row:
    where = None if values["file"] is None else Where(values["file"], values["line"], values["unit"])
    spans = tuple((start, end) for start, end in values["rationale"])
    return Row(values["id"], values["text"], values["text_pair"], values["label"], spans, values["environment"], where)
