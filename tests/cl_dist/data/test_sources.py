import gzip
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.data.sources import Fault, Record, listing, read
from cl_dist.data.tasks import Source
from cl_dist.errors import ConfigError


def read_all(kind: str, path: Path | str, **settings: Any) -> tuple[list[Record], list[Fault]]:
    faults: list[Fault] = []
    source = parse(Source, {"kind": kind, "path": str(path), **settings})
    return list(read(source, faults)), faults


def values(records: list[Record]) -> list[dict[str, Any]]:
    return [record.values for record in records]


def test_jsonl_rows_carry_their_line_and_are_numbered_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}\n')  # BOM, CRLF, U+2028 in a text
    records, faults = read_all("jsonl", path)
    assert [(r.line, r.id, r.values) for r in records] == [
        (1, "0", {"text": "a"}),
        (3, "1", {"text": "b\u2028c"}),
    ]
    assert not faults


def test_a_packed_file_reads_as_the_file_itself_whatever_its_name(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.csv", tmp_path / "b.csv"
    plain.write_text("text,label\na,x\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert values(read_all("csv", packed)[0]) == values(read_all("csv", plain)[0]) == [{"text": "a", "label": "x"}]


def test_a_cell_of_csv_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one, ""two""\nthree",x\n\nfour,y\n')
    records, faults = read_all("csv", path)
    assert [(r.line, r.id, r.values["text"]) for r in records] == [
        (2, "0", 'one, "two"\nthree'),
        (5, "1", "four"),
    ]
    assert not faults


def test_quotes_in_tab_separated_files_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b'id\ttext\r\n1\t"open quote\r\n2\tmid "quote\r\n')
    records, faults = read_all("tsv", path)
    assert values(records) == [{"id": "1", "text": '"open quote'}, {"id": "2", "text": 'mid "quote'}]
    assert not faults


def test_lines_take_the_named_groups_of_the_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("DESC:manner How so ?\nno label here\nHUM:ind Who ?\nsee HUM:ind Who ?\n")
    records, faults = read_all("lines", path, pattern=r"(?P<label>[A-Z]+):\S+ (?P<text>.*)")
    assert values(records) == [{"label": "DESC", "text": "How so ?"}, {"label": "HUM", "text": "Who ?"}]
    assert [fault.line for fault in faults] == [2, 4]  # line 4 holds a match, but is not one
    assert "no label here" in faults[0].message


@pytest.mark.parametrize(
    ("kind", "content", "line", "complaint"),
    [
        ("jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', 2, "not JSON"),
        ("jsonl", b'{"text": "a"}\n["b"]\n', 2, "expected a JSON object with named fields, got list"),
        ("jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', 2, "not utf-8: byte 0xe9 at offset 27 "),
        ("csv", b"text,label\na,x\nb\n", 3, "expected 2 cells as in the header, got 1"),
        ("csv", b'text,label\na,x\n"b,y\nc,z\n', 3, "check for a quote that is not closed"),
        ("csv", b"text,text\na,x\n", 1, "has 'text' more than once"),
        ("csv", b"", None, "is empty"),
        ("tsv", b"text\tlabel\na\tx\ty\n", 2, "expected 2 cells as in the header, got 3"),
        ("jsonl", b"\x1f\x8bnot really packed", None, "compression"),
        ("parquet", b"text,label\n", None, "expected a parquet file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, kind: str, content: bytes, line: int | None, complaint: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    _, faults = read_all(kind, path)
    assert [(fault.file, fault.line) for fault in faults] == [(str(path), line)]
    assert complaint in faults[0].message


def test_reading_goes_on_after_a_fault_so_that_all_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{\n{"text": "a"}\n[]\n\xff\n{"text": "b"}\n')
    records, faults = read_all("jsonl", path)
    assert [record.line for record in records] == [2, 5]
    assert sorted({fault.line for fault in faults if fault.line}) == [1, 3, 4]


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\ncafé\n".encode("cp1252"))
    assert values(read_all("csv", path, encoding="cp1252")[0]) == [{"text": "café"}]


@pytest.mark.parametrize("encoding", ["utf-16", "klingon", "hex"])
def test_an_encoding_that_cannot_be_read_by_lines_is_a_config_error(encoding: str) -> None:
    with pytest.raises(ConfigError, match="encoding"):
        parse(Source, {"kind": "csv", "path": "a.csv", "encoding": encoding})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "complaint"), [("missing", "no such file"), ("package:no_such_package_here/a", "pip install")]
)
def test_a_missing_file_or_package_is_a_fault_not_a_crash(kind: str, name: str, complaint: str) -> None:
    records, faults = read_all(kind, name)
    assert not records
    assert [fault.file for fault in faults] == [name]
    assert complaint in faults[0].message


def test_a_file_per_split_prefixes_ids_and_comes_in_the_order_train_dev_test(tmp_path: Path) -> None:
    paths = {split: str(tmp_path / f"{split}.csv") for split in ("test", "dev", "train")}
    for split, path in paths.items():
        Path(path).write_text(f"text\n{split}\n")
    records, _ = read_all("csv", "", paths=paths, split={"by": "files"})
    assert [(r.split, r.id, r.values["text"]) for r in records] == [
        ("train", "train-0", "train"),
        ("dev", "dev-0", "dev"),
        ("test", "test-0", "test"),
    ]


def test_tables_give_class_names_for_numbers_and_null_for_no_label(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "folder")
    for kind, path in (("parquet", tmp_path / "a.parquet"), ("datasets", tmp_path / "folder")):
        records, faults = read_all(kind, path)
        assert values(records) == [{"text": "a", "label": "yes"}, {"text": "b", "label": None}]
        assert [(r.line, r.id, r.unit) for r in records] == [(0, "0", "row"), (1, "1", "row")]
        assert not faults


def test_a_saved_set_with_splits_names_the_split_in_a_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "folder")
    records, _ = read_all("datasets", tmp_path / "folder", split={"by": "field"})
    assert values(records) == [
        {"split": "train", "text": "train"},
        {"split": "validation", "text": "validation"},
    ]
    assert [r.id for r in records] == ["train-0", "validation-0"]
    assert records[1].file.endswith("folder[validation]")


def test_a_folder_that_is_no_saved_set_is_named(tmp_path: Path) -> None:
    _, faults = read_all("datasets", tmp_path)
    assert "save_to_disk" in faults[0].message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.py", "not a file; data set scripts are not supported"),
        ("./x", "not a file; data set scripts are not supported"),
        ("json", "not a format name; for files set their kind"),
        ("imagefolder", "not a format name"),
    ],
)
def test_a_set_that_is_a_script_a_file_or_a_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("raise SystemExit('run')")
    (tmp_path / "x").write_text("{}")
    (tmp_path / "rows.json").write_text('{"text": "not asked for"}\n')
    records, faults = read_all("datasets", path)
    assert records == []
    assert message in faults[0].message


def test_a_listing_is_capped_and_says_how_many_more_there_are() -> None:
    faults = [Fault("a.csv", line, "text", "is empty") for line in range(2, 27)]
    lines = listing(faults).splitlines()
    assert lines[0] == "  a.csv, line 2, field text: is empty"
    assert len(lines) == 21
    assert lines[-1] == "  ... and 5 more"
    assert "more" not in listing(faults[:20])
