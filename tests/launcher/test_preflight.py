"""`cl-dist check`: each planted fault is found, named and given a remedy; what is sound passes."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse, read_yaml
from cl_dist.contract import tiny
from cl_dist.dispatch_ray.nodes import NodeInfo
from cl_dist.run_config import RunConfig
from cl_dist.run_events import versions
from cl_dist.storage import NodeResources
from launcher.cluster import preflight
from tests.launcher.commands import TASKS, Cli, save_run

SOUND = NodeInfo(
    name="node-1 (192.0.2.1)",
    resources={"CPU": 4.0},
    versions=versions(),
    reads=True,
    writes=True,
    room=NodeResources(free_gb=100.0, shm_gb=8.0, open_files=65536),
)


def looked_at(cli: Cli, *args: object) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Return the exit code, and the findings by their state."""
    ended = cli("check", *args, "--json")
    document = ended.json()
    assert document["passed"] == (ended.code == 0)
    by_state: dict[str, list[dict[str, Any]]] = {"ok": [], "warn": [], "fail": []}
    for finding in document["findings"]:
        by_state[finding["state"]].append(finding)
    assert all(finding["remedy"] for state in ("warn", "fail") for finding in by_state[state])
    return ended.code, by_state


def test_a_sound_run_passes_and_nothing_is_left_behind(cli: Cli, run_file: Path) -> None:
    code, found = looked_at(cli, run_file)
    assert (code, found["fail"]) == (0, [])
    assert {finding["check"] for finding in found["ok"]} == {"model", "resources", "storage", "disk"}
    few = "only 10 test rows: the 95 % interval of an accuracy reaches up to 0.26 to either side"
    rows = [(f["where"], f["found"]) for f in found["warn"] if f["check"] == "data"]
    wanted = f"20 train, 6 dev, 10 test rows; {few}; use 30 test rows or more"
    assert rows == [(f"task {task}", wanted) for task in TASKS]
    assert not (run_file.parent / "runs").exists()


def test_too_few_steps_for_the_gates_of_a_method_are_found(cli: Cli, run_file: Path) -> None:
    code, found = looked_at(cli, run_file, "science.train.epochs=2", "science.train.global_batch=10")
    (hint,) = [finding for finding in found["warn"] if finding["check"] == "steps"]
    assert (code, hint["where"]) == (0, "method ctr")
    assert hint["found"] == "tasks food, film: 4 optimizer steps; masks and routers hardly move below 100"
    assert hint["remedy"] == "raise train.epochs to 50, or lower train.global_batch"
    _, found = looked_at(cli, run_file, "science.train.epochs=50", "science.train.global_batch=10")
    assert not [finding for finding in found["warn"] if finding["check"] == "steps"]


def test_a_bad_row_is_found(cli: Cli, run_file: Path) -> None:
    with (run_file.parent / "food.jsonl").open("a", encoding="utf8") as file:
        file.write('{"text": 3}\n')
    code, found = looked_at(cli, run_file)
    assert code == 4
    assert [(finding["check"], finding["where"]) for finding in found["fail"]] == [("data", "task food")]
    assert "food.jsonl" in found["fail"][0]["found"]


def test_a_label_without_a_test_row_is_found(cli: Cli, run_file: Path) -> None:
    path = run_file.parent / "food.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    kept = [row for row in rows if row["split"] != "test" or row["label"] == "good"]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")
    code, found = looked_at(cli, run_file)
    assert (code, found["fail"]) == (0, [])
    found_of_rows = [finding["found"] for finding in found["warn"] if finding["where"] == "task food"]
    assert any("no test row has the label 'bad', which other splits have" in text for text in found_of_rows)


def test_what_loading_the_rows_warns_of_is_found(cli: Cli, run_file: Path) -> None:
    path = run_file.parent / "food.jsonl"
    changed = (
        path.read_text(encoding="utf8")
        .replace('"good"', '"good\\u001b[31m"')
        .replace('"good\\u001b', '"GOOD\\u001b', 1)
    )
    path.write_text(changed, encoding="utf8")
    code, found = looked_at(cli, run_file)
    assert (code, found["fail"]) == (0, [])
    (warning,) = [finding["found"] for finding in found["warn"] if "look the same" in finding["found"]]
    assert r"'GOOD\x1b[31m' (1 row)" in warning
    shown = cli("check", run_file)
    assert (shown.code, "\x1b" in shown.out) == (0, False)


def writes(folder: Path, **task: Any) -> Path:
    """Return a run file of a method that writes its answers, with settings of task film."""
    tree = tiny.tree(folder, {"science": {"method": dict(tiny.METHODS["lamol"])}}, tasks=("food", "film"))
    tree["science"]["tasks"][1] |= task
    return save_run(folder / "run.yaml", tree)


def film(folder: Path, split: str, number: int, **changes: str) -> int:
    """Change a row of a split of film.jsonl, give every row a pair, and return the line of the row."""
    path = folder / "film.jsonl"
    rows = [{"pair": "soup", **json.loads(line)} for line in path.read_text(encoding="utf8").splitlines()]
    line = [at for at, row in enumerate(rows) if row["split"] == split][number]
    rows[line] |= changes
    tiny.save_rows(path, rows)
    return line + 1


LONG = "cake " * 12


@pytest.mark.parametrize(
    ("split", "changes", "task", "told"),
    [
        (
            "test",
            {"pair": LONG},
            {},
            "field pair: question and answer have 15 + 1 tokens (18 with special tokens), but",
        ),
        ("dev", {"pair": LONG}, {}, "field pair: question and answer have 15 + 1 tokens"),
        ("train", {"pair": LONG}, {}, "field pair: question and answer have 15 + 1 tokens"),
        ("train", {"label": LONG}, {"output": "text", "metric": "f1"}, "field label: question and answer have 4 + 12"),
        ("dev", {"label": LONG}, {"output": "text", "metric": "f1"}, "field label: question and answer have 4 + 12"),
    ],
)
def test_a_row_that_cannot_be_read_by_a_model_that_writes_is_told_before_the_first_stage(
    cli: Cli, tmp_path: Path, split: str, changes: dict[str, str], task: dict[str, str], told: str
) -> None:
    run = writes(tmp_path, text_pair="pair", **task)
    line = film(tmp_path, split, 2, **changes)
    code, found = looked_at(cli, run)
    assert (code, [(finding["check"], finding["where"]) for finding in found["fail"]]) == (4, [("data", "task film")])
    assert f"film.jsonl, line {line}, {told}" in found["fail"][0]["found"]
    assert "train.max_length=16" in found["fail"][0]["found"]
    ended = cli("train", run)
    assert ended.code == 3
    assert f"line {line}, {told}" in " ".join(ended.err.split())
    assert not (tmp_path / "runs").exists()


def test_a_question_that_is_too_long_is_told_with_the_limit_of_its_task(cli: Cli, tmp_path: Path) -> None:
    code, found = looked_at(cli, writes(tmp_path, question=LONG, train={"max_length": 14}))
    assert code == 4
    assert "12 + 1 tokens (15 with special tokens), but train.max_length=14" in found["fail"][0]["found"]
    assert looked_at(cli, writes(tmp_path, question=LONG, train={"max_length": 15}))[0] == 0


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (("+", "-"), "the tokenizer encodes labels '+' and '-' alike ([UNK])"),
        (("Good", "good"), "the tokenizer encodes labels 'Good' and 'good' alike (good)"),
        (("good", "good "), "labels 'good' and 'good ' alike"),
        (("good cake", "\u0301"), "as no token"),
    ],
)
def test_labels_that_the_tokenizer_cannot_tell_apart_are_told_before_the_first_stage(
    cli: Cli, tmp_path: Path, labels: tuple[str, str], told: str
) -> None:
    run = writes(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "film.jsonl").read_text(encoding="utf8").splitlines()]
    path = tmp_path / "decoder" / "tokenizer.json"
    spelling = json.loads(path.read_text(encoding="utf8"))
    cleaning = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    path.write_text(json.dumps(spelling | {"normalizer": cleaning | {"strip_accents": None}}), encoding="utf8")
    renamed = dict(zip(("good", "bad"), labels, strict=True))
    tiny.save_rows(tmp_path / "film.jsonl", [row | {"label": renamed[row["label"]]} for row in rows])
    code, found = looked_at(cli, run)
    assert (code, [(finding["check"], finding["where"]) for finding in found["fail"]]) == (4, [("data", "task film")])
    assert told in found["fail"][0]["found"]
    ended = cli("train", run)
    assert ended.code == 3
    assert told in " ".join(ended.err.split())
    classes = tiny.tree(tmp_path / "classes", {"science": {"method": {"name": "sequential"}}}, tasks=("food",))
    classes["science"]["tasks"][0]["source"]["path"] = str(tmp_path / "film.jsonl")
    assert looked_at(cli, save_run(tmp_path / "classes.yaml", classes))[0] == 0  # classes need no spelling


def test_the_labels_of_a_baseline_that_writes_are_looked_at_too(cli: Cli, tmp_path: Path) -> None:
    run = writes(tmp_path)
    tree = read_yaml(run)
    over = {"method": {"name": "sequential"}, "model": {"output": "lm"}, "train": {"max_length": 5}}
    code, found = looked_at(cli, save_run(run, tree | {"baselines": {"short": over}}))
    assert code == 4
    assert "but train.max_length=5" in found["fail"][0]["found"]


@pytest.mark.parametrize(("metric", "package"), [("rouge_l", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_metric_without_its_package_is_told_before_the_first_stage(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.rouge_scorer", None)
    run = writes(tmp_path, output="text", metric=metric)
    code, found = looked_at(cli, run)
    assert (code, found["fail"][0]["where"]) == (4, "task film")
    assert f"tasks.film.metric '{metric}' needs {package}" in found["fail"][0]["found"]
    ended = cli("train", run)
    assert ended.code == 2
    assert "cl-dist[text]" in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there_is_found(cli: Cli, run_file: Path) -> None:
    code, found = looked_at(cli, run_file, "science.model.source=./nowhere")
    assert code == 4
    assert [finding["check"] for finding in found["fail"]] == ["model"]


def test_a_model_that_cannot_read_so_long_rows_is_found(cli: Cli, run_file: Path) -> None:
    ended = cli("check", run_file, "science.train.max_length=33")
    assert (ended.code, "max_length=33: this model reads at most 32 tokens" in ended.err) == (2, True)
    config = parse(RunConfig, read_yaml(run_file) | {})
    longer = config.model_copy(update={"science": config.science.updated({"train": {"max_length": 33}})})
    (found,) = [each for each in preflight.preflight(longer) if each.state == "fail"]  # as a model from the hub is told
    assert (found.check, found.remedy) == ("model", "lower train.max_length, or use another model")


def test_a_full_disk_is_found(cli: Cli, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(run_file.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, found = looked_at(cli, run_file)
    assert code == 4
    assert [finding["check"] for finding in found["fail"]] == ["disk"]


def test_gpus_that_are_not_there_and_a_cluster_that_is_not_are_found(cli: Cli, run_file: Path) -> None:
    ray = ["cluster.dispatcher=ray", "cluster.engine=deepspeed"]
    code, found = looked_at(cli, run_file, *ray, "cluster.gpus_per_worker=64")
    assert (code, [finding["check"] for finding in found["fail"]]) == (4, ["resources"])
    code, found = looked_at(cli, run_file, *ray, "cluster.address=127.0.0.1:1")
    assert (code, [finding["check"] for finding in found["fail"]]) == (4, ["cluster"])


def test_a_mirror_is_written_and_read_back(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    code, found = looked_at(cli, run_file, f"run.mirror=file://{tmp_path}/store")
    assert (code, found["fail"]) == (0, [])
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    code, found = looked_at(cli, run_file, f"run.mirror=file://{tmp_path}/file/store")
    assert (code, [finding["check"] for finding in found["fail"]]) == (4, ["storage"])


def test_time_limits_are_looked_at(cli: Cli, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 120))
    code, found = looked_at(cli, run_file, "cluster.progress_timeout_s=0", "cluster.checkpoint_minutes=0")
    assert code == 0
    where = [finding["where"] for finding in found["warn"] if finding["check"] == "time"]
    assert where == ["cluster.progress_timeout_s", "cluster.checkpoint_minutes", "SLURM_JOB_END_TIME"]


@pytest.mark.parametrize(
    ("node", "check", "words"),
    [
        (replace(SOUND, error="does not answer: GetTimeoutError"), "node", "does not answer"),
        (replace(SOUND, versions={**versions(), "torch": "1.0"}), "versions", "torch 1.0 (driver:"),
        (replace(SOUND, versions={**versions(), "peft": None}), "versions", "peft missing"),
        (replace(SOUND, reads=False, writes=False), "storage", "does not see the driver's files"),
        (replace(SOUND, writes=False), "storage", "the driver does not see its files"),
        (replace(SOUND, room=replace(SOUND.room, free_gb=0.5)), "disk", "0.5 GB free, the run writes about 1.0 GB"),
        (replace(SOUND, room=replace(SOUND.room, shm_gb=0.06)), "limits", "/dev/shm has 0.06 GB"),
        (replace(SOUND, room=replace(SOUND.room, open_files=1024)), "limits", "1024 open files"),
    ],
)
def test_each_fault_of_a_node_is_named_with_the_node(run_file: Path, node: NodeInfo, check: str, words: str) -> None:
    config = parse(RunConfig, read_yaml(run_file))
    assert all(finding.state == "ok" for finding in preflight._node(SOUND, versions(), config, 1.0))
    (fault,) = [finding for finding in preflight._node(node, versions(), config, 1.0) if finding.state != "ok"]
    assert (fault.check, fault.state) == (check, "warn" if check == "limits" else "fail")
    assert fault.where == SOUND.name
    assert words in fault.found
    assert fault.remedy


def test_a_table_for_people_has_a_line_and_a_remedy_for_each_fault(cli: Cli, run_file: Path) -> None:
    ended = cli("check", run_file, "science.model.source=./nowhere")
    assert ended.code == 4
    assert "fail  model" in ended.out
    assert "-> use a folder" in ended.out


def test_a_tokenizer_that_does_not_fit_is_found_and_its_settings_are_wrong(cli: Cli, run_file: Path) -> None:
    from transformers import AutoTokenizer

    model = run_file.parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["espresso"])
    tokenizer.save_pretrained(model)
    code, found = looked_at(cli, run_file)
    assert (code, [finding["check"] for finding in found["fail"]]) == (2, ["model"])
    for path in model.glob("tokenizer*"):
        path.unlink()
    code, found = looked_at(cli, run_file)
    assert (code, "no tokenizer" in found["fail"][0]["found"]) == (2, True)


def test_a_row_of_no_token_is_found(cli: Cli, run_file: Path) -> None:
    path = run_file.parent / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf8"))
    clean = {"type": "Replace", "pattern": {"Regex": "\u200b"}, "content": ""}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [tokenizer["normalizer"], clean]}
    path.write_text(json.dumps(tokenizer), encoding="utf8")
    with (run_file.parent / "film.jsonl").open("a", encoding="utf8") as file:
        file.write(json.dumps({"id": "last", "text": "\u200b", "label": "good", "split": "test"}) + "\n")
    code, found = looked_at(cli, run_file)
    assert (code, [finding["where"] for finding in found["fail"]]) == (4, ["task film"])
    assert "film.jsonl, line 37, field text: the tokenizer encodes '\\u200b'" in found["fail"][0]["found"]
