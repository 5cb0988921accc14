"""`cl-dist plan` tells what a run takes, from its run file and a config.json alone."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.planning.inputs import _longest_rows
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from tests.launcher.commands import TASKS, Cli, fresh, save_run

LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LARGE = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80} | {
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
BERT = {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16} | {
    "intermediate_size": 4096,
    "vocab_size": 30522,
}
CLUSTER = {"workers": 8, "gpus_per_worker": 1, "zero_stage": 3, "micro_batch": 1}


def save_plan(folder: Path, sizes: dict[str, Any], method: dict[str, Any], **model: Any) -> Path:
    """Write a run file whose backbone is a config.json and whose data are nowhere."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(sizes), encoding="utf8")
    tasks = [{"id": name, "source": {"kind": "jsonl", "path": f"{name}.jsonl"}} for name in ("a", "b")]
    science = {"model": {"source": str(folder / "model"), **model}, "method": method, "tasks": tasks}
    science["train"] = {"global_batch": 32, "max_length": 256}
    return save_run(folder / "big.yaml", {"science": science, "cluster": CLUSTER})


def of(parts: list[dict[str, Any]], kind: str) -> int:
    return int(next(each["bytes"] for each in parts if each["kind"] == kind))


@pytest.mark.parametrize(
    ("sizes", "method", "dtype", "millions"),
    [
        (LLAMA, {"name": "lamol"}, "bfloat16", 8030),
        (LARGE, {"name": "rational_lamol"}, "bfloat16", 70554),
        (BERT, {"name": "sequential"}, "float32", 335),
    ],
)
def test_large_models_are_planned_in_seconds_without_weights_tokenizer_or_data(
    cli: Cli, tmp_path: Path, sizes: dict[str, Any], method: dict[str, Any], dtype: str, millions: int
) -> None:
    path = save_plan(tmp_path, sizes, method, dtype=dtype)
    began = time.process_time()
    ended = cli("plan", path, "--json")
    assert ended.code == 0, ended.err
    assert time.process_time() - began < 60  # 10 s where nothing else runs
    found = ended.json()
    elements = found["memory"]["elements"]["P"]
    assert elements // 10**6 == millions
    assert [each["rows"] for each in found["stages"]] == [None] * len(found["stages"])
    assert any("no data of a (a.jsonl), b (b.jsonl)" in reason for reason in found["assumptions"])
    ranks = {rank["zero_stage"]: rank for rank in found["memory"]["ranks"]}
    assert list(ranks) == ([1, 2, 3] if dtype == "bfloat16" else [0, 1, 2, 3])
    assert [stage for stage, rank in ranks.items() if rank["configured"]] == [3]
    item = 2 if dtype == "bfloat16" else 4
    assert of(ranks[3]["resident"], "weights") == pytest.approx(item * elements / 8, rel=0.001)
    assert of(ranks[1]["resident"], "weights") == pytest.approx(item * elements, rel=0.001)
    assert ranks[3]["peak_bytes"] < ranks[1]["peak_bytes"]


def test_the_cluster_that_would_do_grows_as_devices_shrink(cli: Cli, tmp_path: Path) -> None:
    path = save_plan(tmp_path, LLAMA, {"name": "lamol"}, dtype="bfloat16")
    options = [word for size in (8, 16, 40, 80, 192) for word in ("--device-gib", size)]
    clusters = cli("plan", path, "--json", *options).json()["clusters"]
    assert [each["device_gib"] for each in clusters] == [8, 16, 40, 80, 192]
    assert clusters[0]["workers"] is None
    workers = [each["workers"] for each in clusters[1:]]
    assert workers == sorted(workers, reverse=True)
    assert workers[0] > workers[-1]
    for each in clusters[1:]:
        assert each["peak_bytes"] <= 0.9 * each["device_gib"] * 2**30
    assert clusters[1]["too_small_for"] == ["evaluate", "generate"]  # 15 GiB of weights are whole on every worker
    assert clusters[-1]["too_small_for"] == []
    text = cli("plan", path, "--device-gib", 16).out
    assert "devices of 16 GiB: " in text
    assert (
        "too small for evaluate, generate, where a worker holds the whole model (see cluster.workers_per_model)" in text
    )


def test_a_name_on_the_hub_is_not_downloaded(cli: Cli, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan reads nothing from the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    ended = cli("plan", run_file, "science.model.source=somebody/some-model", "--json")
    assert ended.code == 0, ended.err
    found = ended.json()
    assert found["memory"] is None
    assert any("somebody/some-model" in reason and "nothing is downloaded" in reason for reason in found["assumptions"])
    assert [each["rows"] for each in found["stages"]] == [20, 10, 20, 20]


def test_memory_is_estimated_without_ray_and_deepspeed(run_file: Path) -> None:
    ended, modules = fresh("plan", run_file, "--json", cwd=run_file.parent)
    assert ended.code == 0, ended.err
    assert set(modules) == {"torch", "transformers"}
    assert not (run_file.parent / "runs").exists()


def test_a_plan_marks_what_is_configured_and_names_what_is_read_and_written(cli: Cli, run_file: Path) -> None:
    found = cli("plan", run_file, "--json").json()
    assert [(rank["zero_stage"], rank["configured"]) for rank in found["memory"]["ranks"]] == [
        (None, True),
        *((stage, False) for stage in range(4)),
    ]
    train, score = found["stages"][2:]
    assert train["reads"] == ["film (train, dev)"]
    assert train["inputs"] == ["00-food/train"]
    assert "trainable*.safetensors" in train["writes"]
    assert score["reads"] == ["food (test)", "film (test)"]
    elements = found["memory"]["elements"]
    assert elements["added_by_the_last_task"] < elements["parts_of_tasks"] < 2 * elements["P"]
    assert "torch *" in cli("plan", run_file).out


def test_files_have_the_planned_bytes(cli: Cli, finished: Path) -> None:
    disk = cli("plan", finished / "tiny.yaml", "--json").json()["disk"]
    stage = finished / "runs/tiny/stages/01-film/train"
    header = 30_000  # of a file, for a hundred names
    assert 0 <= (stage / "trainable.safetensors").stat().st_size - of(disk, "trainable.safetensors of a task") < header
    assert (
        0 <= (stage / "learner.safetensors").stat().st_size - of(disk, "learner.safetensors of the last task") < header
    )


def test_a_decoder_is_planned_with_its_cache_its_votes_and_its_two_losses(cli: Cli, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": tiny.METHODS["rational_lamol"]}}, tasks=TASKS)
    found = cli("plan", save_run(tmp_path / "text.yaml", tree), "--json").json()
    pool = found["memory"]["pool"]
    assert set(pool) == {"evaluate", "generate", "record", "vote"}
    # 3 slots, 2 layers, 2 heads of 16, 16 tokens, float32
    assert of(pool["generate"], "KV cache") == 2 * 2 * 2 * 16 * 16 * 4 * 3
    assert of(pool["vote"], "attention statistics") == 2 * 16 * 16 * 8
    labels = found["memory"]["labels"]
    assert labels == {"qa": 8 * 2, "lm": 8 * 16}  # every answer is one word and its end
    assert len(found["assumptions"]) == 1
    assert "a frozen block removes 12,704 elements" in found["assumptions"][0]  # 12 * 32 * 32 + 13 * 32


@pytest.mark.parametrize(
    ("method", "expected"), [("lamol", 24), ("lamol_real", 24), ("joint", 24), ("individual", 12), ("sequential", 12)]
)
def test_rows_of_earlier_tasks_are_planned_as_long_as_they_are(tmp_path: Path, method: str, expected: int) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": dict(tiny.METHODS[method])}}, tasks=("food", "film"))
    for task, length in zip(tree["science"]["tasks"], (24, 12), strict=True):
        task["train"] = {"max_length": length}
    opened = Run(parse(RunConfig, tree))
    assert [_longest_rows(opened, task).max_length for task in (0, 1)] == [24, expected]
