"""eval, predict and export, on a finished CTR run with the baselines `individual` and `plain`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from cl_dist import load_exported
from cl_dist.models.backbone import load_tokenizer
from cl_dist.models.config import ModelConfig
from cl_dist.run import Run
from cl_dist.run_folder import reopen
from tests import tiny
from tests.launcher.commands import ROOT, TASKS, Cli, save_run, stamps


@pytest.fixture
def run(finished: Path) -> Path:
    return finished / "runs" / "tiny"


def rows_of(run: Path, task: str) -> list[dict[str, str]]:
    lines = (run.parents[1] / f"{task}.jsonl").read_text("utf8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "test"]


# --------------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("baseline", ["", "baselines/individual", "baselines/plain"])
def test_eval_finds_the_scores_of_the_run_again_and_writes_nothing(cli: Cli, run: Path, baseline: str) -> None:
    folder = run / baseline
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for after, expected in enumerate(
        json.loads((folder / "metrics/summary.json").read_text("utf8"))["matrix"]["accuracy"]
    ):
        document = cli("eval", folder, "--after", TASKS[after], "--json").json()
        assert (document["after"], document["split"]) == (TASKS[after], "test")
        assert [line["task"] for line in document["tasks"]] == list(TASKS[: after + 1])
        assert [line["accuracy"] for line in document["tasks"]] == expected[: after + 1]
        assert {line["rows"] for line in document["tasks"]} == {10}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_eval_asks_each_tasks_own_model_where_the_plan_has_one(cli: Cli, run: Path) -> None:
    models = {
        folder: [line["model"] for line in cli("eval", run / folder, "--json").json()["tasks"]]
        for folder in ("", "baselines/individual")
    }
    assert models == {"": ["01-film/train"] * 2, "baselines/individual": ["00-food/train", "01-film/train"]}


def test_eval_scores_dev_rows_and_chosen_tasks_in_the_order_asked_for(cli: Cli, run: Path) -> None:
    ended = cli("eval", run, "--split", "dev", "--task", "film", "--task", "food", "--task", "film", "--json")
    assert [(line["task"], line["rows"]) for line in ended.json()["tasks"]] == [("film", 6), ("food", 6)]
    table = cli("eval", run, "--split", "dev", "--task", "film").out
    assert "dev rows, after task film" in table
    assert "food" not in table


def test_eval_of_a_run_that_is_not_finished_takes_the_last_learned_task(cli: Cli, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(folder / "stages" / "01-film")
    document = cli("eval", folder, "--json").json()
    assert (document["after"], [line["task"] for line in document["tasks"]]) == ("food", ["food"])
    shutil.rmtree(folder / "stages")
    ended = cli("eval", folder)
    assert ended.code == 6
    assert "no task has been trained yet; `cl-dist resume`" in ended.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--task", "fod"), 2, "--task 'fod': the run has no such task; did you mean 'food'?"),
        (("--after", "flim"), 2, "--after 'flim': the run has no such task; did you mean 'film'?"),
        (("--task", "film", "--after", "food"), 2, "task film: after task food the method 'ctr' has no model for it"),
        (("--split", "train"), 2, "'train' is not one of 'dev', 'test'"),
    ],
)
def test_eval_refuses_what_the_run_does_not_have(
    cli: Cli, run: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    ended = cli("eval", run, *options)
    assert ended.code == code
    assert message in ended.err
    assert ended.out == ""


def test_a_task_without_rows_of_the_split_is_refused(cli: Cli, run: Path, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, tasks=TASKS)
    tree["science"]["tasks"][0]["source"]["split"] |= {"dev": 0}
    kept = [line for line in (tmp_path / "food.jsonl").read_text("utf8").splitlines() if '"dev"' not in line]
    (tmp_path / "food.jsonl").write_text("\n".join(kept) + "\n", "utf8")
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    save_run(folder / "config.yaml", tree)
    ended = cli("eval", folder, "--split", "dev", "--after", "food")
    assert ended.code == 2
    assert "split dev: task food has no dev rows" in ended.err
    ended = cli("eval", folder, "--after", "food")
    assert ended.code == 6
    assert "00-food/train has not been computed; `cl-dist resume` computes what is missing" in ended.err


@pytest.mark.parametrize("verb", ["eval", "predict", "export"])
def test_damaged_weights_are_named_and_exit_6(cli: Cli, run: Path, tmp_path: Path, verb: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    weights = folder / "stages/00-food/train/trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    options = {"eval": (), "predict": ("--task", "film"), "export": ("--task", "film", tmp_path / "x")}[verb]
    ended = cli(verb, folder, *options)
    assert ended.code == 6
    assert (
        f"{weights}: missing or damaged: it does not match its manifest; remove the folder {weights.parent} and"
        in ended.err
    )
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("baseline", ["", "baselines/individual"])
@pytest.mark.parametrize("task", TASKS)
def test_predict_gives_the_answers_of_the_evaluate_stage(cli: Cli, run: Path, task: str, baseline: str) -> None:
    folder = run / baseline
    rows = rows_of(run, task)
    ended = cli("predict", folder, "--task", task, stdin="\n".join(map(json.dumps, rows)).encode())
    assert ended.code == 0
    answers = [json.loads(line) for line in ended.out.splitlines()]
    stage = "00-food" if baseline and task == "food" else "01-film"
    stored = (folder / "stages" / stage / "evaluate" / "predictions" / f"{task}.jsonl").read_text("utf8")
    expected = [json.loads(line) for line in stored.splitlines()]
    assert [(a["id"], a["prediction"]) for a in answers] == [(e["id"], e["prediction"]) for e in expected]
    for answer in answers:
        assert list(answer["scores"]) == ["bad", "good"]
        assert sum(answer["scores"].values()) == pytest.approx(1.0)
        assert max(answer["scores"], key=answer["scores"].__getitem__) == answer["prediction"]


def test_predict_answers_a_shard_before_it_meets_a_bad_line_in_the_next(cli: Cli, run: Path) -> None:
    lines = [json.dumps({"text": f"the cake is tasty {number}"}) for number in range(8)]
    lines[7] = '{"text": 3}'
    ended = cli("predict", run, "--task", "food", stdin="\n".join(lines).encode())
    assert ended.code == 3
    assert "DataError: line 8: field text: expected text, got int" in ended.err
    assert [json.loads(line)["id"] for line in ended.out.splitlines()] == list(range(6))  # shard_rows is 6


def test_predict_names_the_line_of_what_it_cannot_read(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cleaning(config: ModelConfig) -> Any:
        tokenizer: Any = load_tokenizer(config)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        return tokenizer

    monkeypatch.setattr("cl_dist.stages.predict.load_tokenizer", cleaning)
    ended = cli("predict", run, "--task", "food", stdin=b'{"text": "soup"}\n\n{"text": "\\u200b"}\n')
    assert (ended.code, ended.out) == (3, "")
    assert r"line 3: field text: the tokenizer encodes '\u200b' as no token" in ended.err
    monkeypatch.setattr("cl_dist.stages.predict.num_embeddings", lambda config: 10)
    ended = cli("predict", run, "--task", "food", stdin=b'{"text": "the gripping soup"}')
    assert (ended.code, ended.out) == (3, "")
    assert "line 1: field text: contains " in ended.err


def test_predict_never_writes_scores_that_are_no_numbers(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cl_dist.stages.predict.Predictor.logits", lambda self, task, rows: [torch.full((2,), torch.nan) for _ in rows]
    )
    ended = cli("predict", run, "--task", "food", stdin=b'{"text": "soup"}')
    assert (ended.code, ended.out) == (6, "")
    assert "row 0: the model's logits are not finite" in ended.err


def test_predict_of_nothing_is_nothing(cli: Cli, run: Path) -> None:
    ended = cli("predict", run, "--task", "food", stdin=b"\n")
    assert (ended.code, ended.out) == (0, "")


def test_predict_needs_a_task_of_the_run(cli: Cli, run: Path) -> None:
    assert cli("predict", run).code == 2
    ended = cli("predict", run, "--task", "films")
    assert ended.code == 2
    assert "did you mean 'film'?" in ended.err


def test_predict_ends_quietly_when_nobody_reads_on(run: Path) -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "predict", str(run), "--task", "food"],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.write(b'{"text": "the cake"}\n' * 8)
    process.stdin.close()
    process.stdin = process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


# ------------------------------------------------------------------------------------------------------------- export


def test_export_writes_a_model_that_answers_as_predict_does(cli: Cli, run: Path, tmp_path: Path) -> None:
    before = stamps(run)
    ended = cli("export", run, "--task", "film", tmp_path / "out" / "film", "--json")
    assert ended.code == 0
    assert stamps(run) == before
    document = ended.json()
    assert (document["task"], document["model"]) == ("film", "01-film/train")
    files = {"README.md", "config.json", "backbone/model.safetensors", "cl_dist.json", "parts.safetensors"}
    assert files <= document["files"].keys()

    model, tokenizer, labels = load_exported(tmp_path / "out" / "film")
    texts = [row["text"] for row in rows_of(run, "film")][:4]
    with torch.no_grad():
        logits_BK = model(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    answers = [
        json.loads(line) for line in cli("predict", run, "--task", "film", stdin=lines.encode()).out.splitlines()
    ]
    assert [labels[k] for k in logits_BK.argmax(-1).tolist()] == [answer["prediction"] for answer in answers]
    scores = torch.tensor([list(answer["scores"].values()) for answer in answers])
    torch.testing.assert_close(logits_BK.softmax(-1), scores)
    card = json.loads((tmp_path / "out" / "film" / "cl_dist.json").read_text("utf8"))
    opened = Run(reopen(run))
    assert card["fingerprint"] == opened.ledger.fingerprint(opened.plan(1)[0])


def test_export_lists_its_files_and_refuses_the_folder_the_next_time(cli: Cli, run: Path, tmp_path: Path) -> None:
    ended = cli("export", run, "--task", "food", tmp_path / "food")
    assert ended.code == 0
    assert f"bytes  {tmp_path / 'food' / 'parts.safetensors'}" in ended.out
    ended = cli("export", run, "--task", "food", tmp_path / "food")
    assert ended.code == 2
    assert "exists and is not an empty folder; choose another one, or remove it" in ended.err
