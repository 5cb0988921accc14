"""The commands of the front page and of the page of commands, and the calls of the library's page, run as printed."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.contract import tiny
from tests.launcher.commands import Cli, save_run
from tests.pages.commands import SHELL, commands, program
from tests.pages.markdown import blocks, pages

MARK = "tests/launcher/test_readme.py"
BLOCKS = [
    block
    for page, text in pages().items()
    for block in blocks(page, text)
    if block.language == SHELL and MARK in block.by
]


def write_data(folder: Path) -> None:
    """Write 80 rows for each task of the front page, and rows.jsonl."""
    folder.joinpath("data").mkdir()
    drawn = random.Random(0)
    words = {"good": "tasty", "bad": "bland"}
    rows = [
        {"text": f"the {drawn.choice(tiny.THINGS)} was {words[label]} {drawn.choice(tiny.FILLERS)}", "label": label}
        for label in ("good", "bad") * 40
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "data/laptop.jsonl").write_text(lines, encoding="utf8")
    (folder / "rows.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]), encoding="utf8")
    with (folder / "data/restaurant.csv").open("w", encoding="utf8", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(rows)


def front_page() -> Any:
    """Return the run file of the front page."""
    (found,) = (block.text for block in blocks("README.md", pages()["README.md"]) if block.language == "yaml")
    return yaml.safe_load(found)


def write_run(folder: Path) -> None:
    """Write the front page's run file with a tiny model, and its data."""
    write_data(folder)
    small = tiny.tree(folder / "tiny")
    tree = front_page()
    tree["science"]["model"] = small["science"]["model"]  # in the place of MiniLM
    tree["science"]["train"] |= {"max_length": 16, "global_batch": 8}
    tree["science"]["method"] |= {"tsm_size": 24, "capsule_mid": 6, "filters": 5}
    tree["cluster"] = {"dispatcher": "local", "engine": "torch"}  # in the place of two Ray workers
    save_run(folder / "reviews.yaml", tree)


def test_the_commands_run_in_the_order_of_the_pages(cli: Cli, tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [block.page for block in BLOCKS] == ["README.md", "launcher/README.md"]
    found = [tuple(words) for block in BLOCKS[::-1] for words in commands(block.text) if program(words) == "cl-dist"]
    for words in dict.fromkeys(found):  # what both pages have runs once
        ended = cli(*words[1:], stdin=(tmp_path / "rows.jsonl").read_bytes())
        assert ended.code == 0, (words, ended.err)
        if words[1] == "predict":
            keys = [json.loads(line).keys() for line in ended.out.splitlines()]
            assert [key >= {"prediction", "scores"} for key in keys] == [True] * 3
    assert (tmp_path / "runs/reviews/report/index.html").is_file()
    assert (tmp_path / "exported/README.md").is_file()


def test_the_calls_of_the_library_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "cl_dist/README.md"
    (calls,) = [block.text for block in blocks(page, pages()[page]) if block.language == "python" and MARK in block.by]
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(calls, names)
    assert names["run"].tasks == ["laptop", "restaurant"]
    assert [line.status for line in names["run"].progress()] == ["finished", "finished"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] in ("good", "bad") for line in printed] == [True, True]
    assert (tmp_path / "exported" / "README.md").is_file()
