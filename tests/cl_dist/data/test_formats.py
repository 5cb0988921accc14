"""Files that are not what their kind says are named for what they are, once; and all that is of the kind is read."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cl_dist.data.load import check_task
from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import DataConfig, TaskConfig

ROWS = [
    {"text": f"text {number}", "label": label, "split": split}
    for number, (split, label) in enumerate(
        (split, label) for split in ("train", "dev", "test") for label in ("bad", "good") for _ in (0, 1)
    )
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>\n"


def loaded(path: Path, kind: str = "jsonl", **source: Any) -> tuple[TaskData, list[str]]:
    given = {"kind": kind, "path": str(path), "split": {"by": "field"}, **source}
    found = check_task(TaskConfig.model_validate({"id": "a", "source": given}), DataConfig())
    return found.data, [str(fault).removeprefix(str(path)) for fault in found.faults]


def fault(path: Path, content: bytes, kind: str = "jsonl", **source: Any) -> str:
    path.write_bytes(content)
    (found,) = loaded(path, kind, **source)[1]
    return found


def table(mark: str) -> bytes:
    return "".join(mark.join(cells) + "\n" for cells in (list(ROWS[0]), *(list(row.values()) for row in ROWS))).encode()


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, LINES)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return file.getvalue()


def columns(rows: Any = ROWS) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def written(**more: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns() | more), file)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "lines", "parquet"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (POINTER, "a Git LFS pointer, not the file itself; get the file with `git lfs pull`"),
        (PAGE, "a web page"),
        (lzma.compress(LINES), "an .xz archive"),
        (bz2.compress(LINES), "a .bz2 archive"),
        (b"\x28\xb5\x2f\xfd" + b"\x24\x00" * 20, "a .zst archive"),
        (zipped("a.jsonl"), "a zip archive"),
        (zipped("xl/workbook.xml"), "an Excel file; save it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Excel or Word file"),
        (tarred(), "a tar archive"),
        (gzip.compress(tarred()), "a tar archive"),
        (pickle.dumps(ROWS), "a pickle, which is never loaded"),
        (b"SQLite format 3\x00" + bytes(100), "an SQLite database"),
        (LINES.decode().encode("utf-16"), "text in UTF-16"),
        (LINES.decode().encode("utf-16-le"), "text in UTF-16"),
        (b"", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_file_of_rows_is_named_once(tmp_path: Path, kind: str, content: bytes, name: str) -> None:
    said = fault(tmp_path / "rows", content, kind, **({"pattern": "(?P<text>.*)"} if kind == "lines" else {}))
    assert name in said or (content == b"" and "has no rows" in said)


def test_parquet_and_a_folder_are_named_where_text_is_expected(tmp_path: Path) -> None:
    assert "this is a parquet file; set kind: parquet; kind: jsonl expects one JSON object per line" in fault(
        tmp_path / "a", written()
    )
    assert "expected a parquet file, but this is text" in fault(tmp_path / "a", LINES, "parquet")
    (found,) = loaded(tmp_path, "csv")[1]
    assert found == ": is a directory; kind: csv expects a file"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (json.dumps(ROWS, indent=1), "line 1: a JSON array, not JSON lines; write one object per line"),
        (json.dumps(ROWS), "line 1: a JSON array"),
        ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]", "line 1: a JSON array"),
        ("\n\n" + json.dumps({"data": ROWS}, indent=1), "line 3: a JSON document over several lines"),
        ('{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}", "line 1: a JSON document over several lines"),
        ("\n".join(map(repr, ROWS)), "line 1: not JSON: Expecting property name enclosed in double quotes"),
        (table(",").decode(), "no line is valid: kind: jsonl expects one JSON object per line"),
        ("  \n\n", "has no rows"),
    ],
)
def test_json_that_is_no_json_lines_is_named_once(tmp_path: Path, content: str, name: str) -> None:
    assert name in fault(tmp_path / "a", content.encode())


@pytest.mark.parametrize(
    ("kind", "content", "name"),
    [
        ("csv", table(";"), "cells seem to be separated by semicolons; convert it to commas"),
        ("csv", table("\t"), "cells seem to be separated by tabs; set kind: tsv"),
        ("csv", table("|"), "cells seem to be separated by bars"),
        ("tsv", table(","), "cells seem to be separated by commas; set kind: csv"),
        ("tsv", table(";"), "cells seem to be separated by semicolons; convert it to tabs"),
        ("csv", b"sep=,\n" + table(","), "line 1: this line is an Excel directive, not a header; remove it"),
        ("csv", b"\xef\xbb\xbfsep=;\r\n" + table(";"), "line 1: this line is an Excel directive"),
        ("tsv", b"sep=\t\n" + table("\t"), "line 1: this line is an Excel directive"),
        ("csv", b"text,label,split\n", "has no rows"),
        ("lines", table(","), "no line is valid: kind: lines expects lines that source.pattern matches"),
    ],
)
def test_tables_with_other_marks_are_named_once(tmp_path: Path, kind: str, content: bytes, name: str) -> None:
    more = {"pattern": r"(?P<label>\w+): (?P<text>.*)"} if kind == "lines" else {}
    assert name in fault(tmp_path / "a", content, kind, **more)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_long_cell_is_read(tmp_path: Path, kind: str) -> None:
    long = "soup " * 60_000
    content = table("," if kind == "csv" else "\t").replace(b"text 1", long.encode()).replace(b"text 3", b"a\0b")
    (tmp_path / "a").write_bytes(content)
    data, faults = loaded(tmp_path / "a", kind)
    assert not faults
    assert data.train[1].text == long


ODD = {
    "map": pyarrow.array([[("k", 1)]] * len(ROWS), pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "struct": pyarrow.array([{"a": [{"b": 1}]}] * len(ROWS)),
    "list": pyarrow.array([[1, None]] * len(ROWS)),
    "binary": pyarrow.array([b"\xff"] * len(ROWS)),
    "decimal": pyarrow.array([Decimal("1.50")] * len(ROWS)),
    "dates": pyarrow.array([0] * len(ROWS), pyarrow.duration("ns")),
    "uuid": pyarrow.array([bytes(16)] * len(ROWS), pyarrow.uuid()),
    "null": pyarrow.nulls(len(ROWS)),
    "a.b": pyarrow.array(["dotted"] * len(ROWS)),
}


@pytest.mark.parametrize("name", list(ODD))
def test_columns_of_parquet_that_no_setting_names_may_be_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.parquet").write_bytes(written(**{name: ODD[name]}))
    data, faults = loaded(tmp_path / "a.parquet", "parquet")
    assert not faults
    assert [row.text for row in data.train] == ["text 0", "text 1", "text 2", "text 3"]


def test_a_column_of_a_saved_set_that_no_setting_names_is_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [{"bytes": b"no picture", "path": None}] * len(ROWS)
    features = datasets.Features({name: datasets.Value("string") for name in ROWS[0]} | {"image": datasets.Image()})
    datasets.Dataset.from_dict(columns() | {"image": pictures}, features=features).save_to_disk(str(tmp_path / "set"))
    assert not loaded(tmp_path / "set", "datasets")[1]


@pytest.mark.parametrize("name", ["map", "uuid", "struct", "list", "binary", "decimal"])
def test_a_column_that_a_setting_names_must_have_values(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.parquet").write_bytes(written(label=ODD[name]))
    _, faults = loaded(tmp_path / "a.parquet", "parquet")
    assert faults
    assert all("label" in said for said in faults)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(written(map=ODD["map"]))
    (said,) = loaded(tmp_path / "a.parquet", "parquet", where={"maps": "x"})[1]
    assert said == ", field maps: no row has this column, which `where` refers to; did you mean 'map'?"


def test_folders_of_parquet_with_a_column_in_their_names_and_dotted_columns_are_read(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        part = [{"label": row["label"], "a.b": row["text"]} for row in ROWS if row["split"] == split]
        (tmp_path / "set" / f"split={split}").mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns(part)), tmp_path / "set" / f"split={split}" / "a.parquet")
    data, faults = loaded(tmp_path / "set", "parquet", columns={"a.b": "text"})
    assert not faults
    assert sorted(row.text for row in data.test) == ["text 10", "text 11", "text 8", "text 9"]


def test_two_columns_of_one_name_are_a_fault(tmp_path: Path) -> None:
    names, values = [*columns(), "label"], [*columns().values(), ["good"] * len(ROWS)]
    parquet.write_table(pyarrow.table(values, names=names), tmp_path / "a.parquet")
    assert loaded(tmp_path / "a.parquet", "parquet")[1] == [": 'label' is the name of several columns"]
