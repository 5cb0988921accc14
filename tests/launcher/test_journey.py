"""The five commands of the first run on the page of commands, typed as printed, over a tiny model."""

import csv
import random
from pathlib import Path

import pytest

from cl_dist.contract import tiny
from launcher import starter
from tests.launcher.commands import Cli
from tests.pages.commands import SHELL, commands, program
from tests.pages.markdown import blocks, pages

PAGE = "launcher/README.md"
MARK = "tests/launcher/test_journey.py"
VERBS = ["init", "data check", "train", "report", "export"]


def write_data(folder: Path) -> None:
    """Write the two files of the page, with as many rows."""
    (folder / "data").mkdir()
    drawn = random.Random(0)
    tasks = {
        "questions": (["question", "kind"], {"HUM": "actor", "LOC": "table"}),
        "spam": (["id", "message", "is_spam"], {"0": "gripping", "1": "dull"}),
    }
    for name, (columns, words) in tasks.items():
        with (folder / "data" / f"{name}.csv").open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            for number in range(300):
                label = drawn.choice(list(words))
                fill = " ".join(drawn.choices(tiny.FILLERS, k=drawn.randint(3, 9)))
                text = f"the {drawn.choice(tiny.THINGS)} {fill} {words[label]}"
                table.writerow([number, text, label] if "id" in columns else [text, label])


def test_five_commands_lead_from_two_files_to_an_exported_model(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [found for found in blocks(PAGE, pages()[PAGE]) if found.language == SHELL and found.by == MARK]
    typed = [words[1:] for words in commands(block.text) if program(words) == "cl-dist"]
    assert [" ".join(words[: len(verb.split())]) for words, verb in zip(typed, VERBS, strict=True)] == VERBS
    write_data(tmp_path)
    source = str(tiny.save_model(tmp_path / "tiny"))
    monkeypatch.setattr(starter, "backbone", lambda model, output: (source, "in the place of the installed one"))
    for words in typed:
        ended = cli(*words)
        assert ended.code == 0, (words, ended.err)
    run = tmp_path / "runs/run"
    assert (run / "report/index.html").is_file()
    assert (tmp_path / "exported/README.md").is_file()
    (line, *others) = cli("runs", "--json").json()
    assert (line["run"], line["method"], line["tasks_done"], line["status"]) == ("run", "ctr", 2, "finished")
    assert 0 <= line["score"] <= 1
    assert [other["run"] for other in others] == ["run/baselines/individual", "run/baselines/sequential"]
