"""`cl-dist check`: each planted fault is found, named and given a remedy; what is sound passes."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse, read_yaml
from cl_dist.dispatch_ray.nodes import NodeFacts
from cl_dist.run_config import RunConfig
from cl_dist.storage import Room
from cl_dist.tracking import versions
from launcher import preflight
from tests.launcher.commands import Cli

SOUND = NodeFacts(
    name="node-1 (192.0.2.1)",
    resources={"CPU": 4.0},
    versions=versions(),
    reads=True,
    writes=True,
    room=Room(free_gb=100.0, shm_gb=8.0, open_files=65536),
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
    assert (code, found["fail"], found["warn"]) == (0, [], [])
    assert {finding["check"] for finding in found["ok"]} == {"data", "model", "resources", "storage", "disk"}
    assert not (run_file.parent / "runs").exists()


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
    assert [finding["found"].partition("; ")[2] for finding in found["warn"]] == ["no test row has the label bad"]


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
    (warning,) = [finding["found"] for finding in found["warn"] if "read alike" in finding["found"]]
    assert r"'GOOD\x1b[31m' (1 row)" in warning
    shown = cli("check", run_file)
    assert (shown.code, "\x1b" in shown.out) == (0, False)


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
    assert (found.check, found.remedy) == ("model", "lower train.max_length, or take another model")


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
    code, found = looked_at(cli, run_file, "cluster.step_timeout_s=0", "cluster.checkpoint_minutes=0")
    assert code == 0
    where = [finding["where"] for finding in found["warn"]]
    assert where == ["cluster.step_timeout_s", "cluster.checkpoint_minutes", "SLURM_JOB_END_TIME"]


@pytest.mark.parametrize(
    ("node", "check", "words"),
    [
        (replace(SOUND, error="does not answer: GetTimeoutError"), "node", "does not answer"),
        (replace(SOUND, versions={**versions(), "torch": "1.0"}), "versions", "torch 1.0 (driver:"),
        (replace(SOUND, versions={**versions(), "peft": None}), "versions", "peft missing"),
        (replace(SOUND, reads=False, writes=False), "storage", "does not read what the driver writes"),
        (replace(SOUND, writes=False), "storage", "its files do not come back"),
        (replace(SOUND, room=replace(SOUND.room, free_gb=0.5)), "disk", "0.5 GB free, the run writes about 1.0 GB"),
        (replace(SOUND, room=replace(SOUND.room, shm_gb=0.06)), "limits", "/dev/shm has 0.06 GB"),
        (replace(SOUND, room=replace(SOUND.room, open_files=1024)), "limits", "1024 open files"),
    ],
)
def test_each_fault_of_a_node_is_named_with_the_node(run_file: Path, node: NodeFacts, check: str, words: str) -> None:
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
    assert "-> name a folder" in ended.out


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
    assert "film.jsonl, line 37, field text: the tokenizer makes no token of '\\u200b'" in found["fail"][0]["found"]
