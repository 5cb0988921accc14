"""Guesses of columns, splits and formats from files of many shapes."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cl_dist.config import parse
from cl_dist.data.load import check_task
from cl_dist.data.sniff import Asked, Files, Guess, find_files, guess
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import DataError

TEXTS = [f"the waiter number {n} was {word}" for n in range(30) for word in ("friendly", "rude")]
ROWS: list[dict[str, Any]] = [
    {"id": n, "review": text, "stars": "good" if "friendly" in text else "bad"} for n, text in enumerate(TEXTS)
]


def save(path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Path:
    """Write rows in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    else:
        with path.open("w", newline="", encoding=options.pop("encoding", "utf8")) as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",", **options)
            table.writeheader()
            table.writerows(rows)
    return path


def guessed(*paths: Path, free_text: bool = False, **asked: Any) -> Guess:
    (files,) = find_files(paths)
    return guess(files, Asked(**asked), free_text=free_text)


def used(found: Guess) -> dict[str, str]:
    return {column.use: column.name for column in found.columns if column.use}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_columns_are_found_in_every_format(tmp_path: Path, name: str) -> None:
    found = guessed(save(tmp_path / name))
    assert used(found) == {"text": "review", "label": "stars", "row_id": "id"}
    assert (found.task["id"], found.task["source"]["kind"], found.rows) == ("a", name.split(".")[1], 60)
    loaded = check_task(parse(TaskConfig, found.task), DataConfig())
    assert loaded.faults == ()
    assert loaded.data.labels == ("bad", "good")


def test_a_byte_order_mark_and_unicode_columns_stay(tmp_path: Path) -> None:
    rows = [{"Überschrift": f"Zeile {n} über Käse", "Ämter": "ja" if n % 2 else "nein"} for n in range(20)]
    found = guessed(save(tmp_path / "Käse & Brot.csv", rows, encoding="utf-8-sig"))
    assert found.task["id"] == "Kase-Brot"
    assert used(found) == {"text": "Überschrift", "label": "Ämter"}


def test_tokens_of_a_script_without_spaces_are_its_characters(tmp_path: Path) -> None:
    rows = [{"text": "机器学习" * 20 + str(n), "label": "ab"[n % 2]} for n in range(20)]
    assert guessed(save(tmp_path / "a.jsonl", rows)).tokens == 81
    assert guessed(save(tmp_path / "b.jsonl", [{**row, "text": "seven ch" * 7} for row in rows])).tokens == 16


def test_a_single_row_has_one_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all rows have the label a \(1\)"):
        guessed(save(tmp_path / "a.jsonl", [{"text": "hello", "label": "a"}]))


def test_bytes_that_are_not_utf8_are_read_as_cp1252(tmp_path: Path) -> None:
    rows = [{"text": f"café {n}", "label": str(n % 2)} for n in range(20)]
    found = guessed(save(tmp_path / "a.csv", rows, encoding="cp1252"))
    assert found.task["source"]["encoding"] == "cp1252"
    assert check_task(parse(TaskConfig, found.task), DataConfig()).data.train[0].text.startswith("café")


def test_tabs_in_a_file_named_csv_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\tlabel\n" + "".join(f"row {n}\t{n % 2}\n" for n in range(20)), encoding="utf8")
    assert guessed(path).task["source"]["kind"] == "tsv"


def test_known_names_win_over_shapes(tmp_path: Path) -> None:
    rows = [{"notes": "long " * 20 + str(n), "Text": f"short {n}", "colour": n % 3, "Label": n % 2} for n in range(30)]
    assert used(guessed(save(tmp_path / "a.jsonl", rows))) == {"text": "Text", "label": "Label"}


def test_columns_named_by_hand_win(tmp_path: Path) -> None:
    rows = [{"notes": f"long {n}", "text": f"short {n}", "label": n % 3, "other": n % 2, "key": n} for n in range(30)]
    found = guessed(save(tmp_path / "a.jsonl", rows), text="notes", label="other", id="key")
    assert used(found) == {"text": "notes", "label": "other", "row_id": "key"}


def test_pairs_are_found_by_name(tmp_path: Path) -> None:
    rows = [{"premise": f"a {n}", "hypothesis": f"b {n}", "label": n % 2} for n in range(20)]
    assert used(guessed(save(tmp_path / "a.jsonl", rows))) == {
        "text": "premise",
        "text_pair": "hypothesis",
        "label": "label",
    }


def test_columns_of_lists_and_mappings_are_shown_and_not_used(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": n % 2, "tokens": ["a", str(n)], "meta": {"k": n}} for n in range(20)]
    for name in ("a.jsonl", "a.parquet"):
        found = guessed(save(tmp_path / name, rows))
        shown = {column.name: (column.shown, column.why) for column in found.columns if not column.use}
        assert shown["tokens"] == ("list values", "neither text nor labels")
        assert shown["meta"] == ("dict values", "neither text nor labels")


def test_a_column_of_splits_is_mapped_to_train_dev_and_test(tmp_path: Path) -> None:
    names = ["train"] * 20 + ["validation"] * 6 + ["test"] * 8
    rows = [{"text": f"row {n}", "label": n % 2, "split": name} for n, name in enumerate(names)]
    found = guessed(save(tmp_path / "a.csv", rows))
    assert found.task["source"]["split"] == {"by": "field", "names": {"validation": "dev"}}
    loaded = check_task(parse(TaskConfig, found.task), DataConfig())
    assert [len(loaded.data.rows(split)) for split in ("train", "dev", "test")] == [20, 6, 8]


def test_dev_rows_serve_as_test_rows_where_there_are_none(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": n % 2, "Set": "Train" if n < 20 else "Val"} for n in range(30)]
    found = guessed(save(tmp_path / "a.csv", rows))
    split = {"by": "field", "field": "Set", "dev": 0, "names": {"Train": "train", "Val": "test"}}
    assert found.task["source"]["split"] == split
    assert found.notes["split"] == "the data have no test rows: their dev rows serve as test rows"
    loaded = check_task(parse(TaskConfig, found.task), DataConfig())
    assert (loaded.faults, len(loaded.data.train), len(loaded.data.test)) == ((), 20, 10)


@pytest.mark.parametrize("names", [("train", "dev", "test"), ("training", "valid", "testing"), ("train", "test")])
def test_a_folder_of_splits_is_one_task(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        save(tmp_path / "reviews" / f"{name}.csv", ROWS[number * 20 : number * 20 + 20])
    found = guessed(tmp_path / "reviews")
    assert found.task["id"] == "reviews"
    assert len(found.task["source"]["paths"]) == len(names)
    loaded = check_task(parse(TaskConfig, found.task), DataConfig())
    assert loaded.faults == ()
    assert [len(loaded.data.rows(split)) for split in ("train", "dev", "test")] == [20, 20 * (len(names) - 2), 20]


def test_a_folder_of_files_and_folders_is_several_tasks(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "c/train.csv", "c/test.csv", "notes.txt", "d/other.csv"):
        save(tmp_path / name)
    assert [files.task for files in find_files([tmp_path])] == ["a", "b", "c"]
    assert find_files([tmp_path / "c/train.csv", tmp_path / "c/test.csv"]) == [
        Files("c", {"train": tmp_path / "c/train.csv", "test": tmp_path / "c/test.csv"})
    ]


def test_files_of_one_name_are_two_tasks(tmp_path: Path) -> None:
    paths = [save(tmp_path / name) for name in ("x/a.csv", "y/a.csv", "y/a.jsonl")]
    assert [files.task for files in find_files(paths)] == ["a", "a-2", "a-3"]


def test_repeated_texts_are_dropped_and_said(tmp_path: Path) -> None:
    found = guessed(save(tmp_path / "a.csv", [*ROWS, *({**row, "id": 100 + row["id"]} for row in ROWS[:5])]))
    assert found.task["source"]["dedupe"] is True
    assert found.notes["dedupe"] == "5 of 65 rows repeat the text of another"


def test_ids_that_repeat_are_not_ids(tmp_path: Path) -> None:
    found = guessed(save(tmp_path / "a.csv", [{**row, "id": row["id"] // 2} for row in ROWS]))
    assert "row_id" not in found.task
    assert found.columns[0].why == "not an id: values are missing or repeated"


def test_free_text_answers_are_taken_when_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": f"answer {n}"} for n in range(30)]
    path = save(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"'label' has 30 values in 30 rows, too many for labels; .* --output lm"):
        guessed(path)
    found = guessed(path, free_text=True)
    assert (found.task["output"], found.task["metric"]) == ("text", "f1")


@pytest.mark.parametrize(
    ("rows", "asked", "message"),
    [
        ([{"text": f"t {n}", "label": "x"} for n in range(20)], {}, r"all rows have the label x.*--label COLUMN"),
        ([{"text": f"t {n}"} for n in range(20)], {}, r"no column looks like a label; .*\(columns: text\)"),
        (
            [{"text": f"t {n}", "a": n % 2, "b": n % 3} for n in range(20)],
            {},
            r"several columns may be the label: a \(2 values\), b \(3 values\); name it with --label",
        ),
        ([{"n": n, "label": n % 2} for n in range(20)], {}, r"no column of text; name it with --text COLUMN"),
        (ROWS, {"text": "revew"}, r"--text 'revew': no such column; did you mean 'review'\?"),
        (ROWS, {"label": "star"}, r"--label 'star': no such column; did you mean 'stars'\?"),
        (ROWS, {"id": "stars"}, r"--id 'stars': expected a different value in every row"),
        (ROWS, {"split": "stars"}, r"--split 'stars': expected the names train, dev and test"),
        (ROWS, {"text": "stars", "label": "stars"}, r"--text 'stars' is also the column of label"),
        ([{"text": f"t {n}", "label": ["a"]} for n in range(20)], {}, r"column 'label' expected a label, got list"),
    ],
)
def test_what_cannot_be_guessed_names_file_columns_and_option(
    tmp_path: Path, rows: list[dict[str, Any]], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        guessed(save(tmp_path / "a.jsonl", rows), **asked)
    assert str(tmp_path / "a.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"no row can be read\n  .*a.csv: is empty; expected a header"),
        ("a.jsonl", "", r"no row can be read\n  .*a.jsonl: has no rows"),
        ("a.csv", "text;label\na;b\n", r"cells seem to be separated by semicolons"),
        ("a.jsonl", "[1, 2]", r"a JSON array, not JSON lines"),
        ("a.parquet", "x", r"expected a parquet file"),
        ("a.xls", "x", r"a.xls: expected a file that ends in .csv, .tsv"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf8")
    with pytest.raises(DataError, match=message):
        guessed(tmp_path / name)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no data files in this folder; expected .csv.*found notes.txt"):
        find_files([tmp_path])
