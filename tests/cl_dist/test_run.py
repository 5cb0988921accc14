"""What identifies a stage: every science setting that it depends on, and nothing else."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cl_dist.config import Section, Tree, merged, parse
from cl_dist.contract import tiny
from cl_dist.data.tasks import DataConfig
from cl_dist.methods.ctr import CtrConfig
from cl_dist.methods.finetune import FinetuneConfig
from cl_dist.models.config import ModelConfig
from cl_dist.models.digest import model_digest, model_facts
from cl_dist.run import Run
from cl_dist.run_config import ClusterConfig, RunConfig, RunSection, Science
from cl_dist.stage import EvaluateConfig, GenerateConfig, Stage, Train, TrainConfig, VoteConfig, digest_of, ref

TASKS = ("food", "film", "topic")
ALL = [f"{number:02d}-{task}/{stage}" for number, task in enumerate(TASKS) for stage in ("train", "evaluate")]
SCORES = [key for key in ALL if key.endswith("/evaluate")]
LATER = ALL[2:]
"""The stages of the second task and of those after it."""

# Another value for each field: a field that is added must be added here, and so is decided to be science or not.
RUN: Tree = {"name": "other", "dir": "elsewhere", "trackers": ["mlflow"], "mirror": "memory://runs", "log_every": 3}
CLUSTER: Tree = {
    "dispatcher": "local",
    "engine": "torch",
    "zero_stage": 3,
    "micro_batch": 3,
    "persistence_threshold": 7,
    "verify_protection_every": 3,
    "profile": {"steps": [1, 3]},
    "address": "auto",
    "workers": 5,
    "cpus_per_worker": 2.0,
    "gpus_per_worker": 1.0,
    "max_failures": 9,
    "start_timeout_s": 7.0,
    "stop_timeout_s": 7.0,
    "lost_node_timeout_s": 7.0,
    "progress_timeout_s": 7.0,
    "min_workers": 1,
    "elastic_interval_s": 7.0,
    "activation_checkpointing": True,
    "checkpoint_minutes": 3.0,
    "checkpoint_steps": 2,
    "checkpoint_async": False,
    "workers_per_model": 2,
    "offload": "all",
    "offload_folder": "fast",
}
BESIDE: Tree = {
    "offload": {"engine": "deepspeed", "zero_stage": 3},
    "offload_folder": {"engine": "deepspeed", "zero_stage": 3, "offload": "all"},
    "workers_per_model": {"engine": "deepspeed", "dispatcher": "ray", "workers": 2, "gpus_per_worker": 1.0},
}
"""What these settings of CLUSTER need beside them."""
MODEL: Tree = {
    "revision": "abc",
    "dtype": "bfloat16",
    "dropout": 0.1,
    "pooling": "cls",
    "output": "classifier",
    "spare_task_tokens": 8,
    "weight_bits": 4,
    "config": {"model_type": "bert"},
}
GENERATE: Tree = {
    "parallel_samples": 5,
    "kv_cache_gb": 1.0,
    "shard_samples": 3,
    "top_k": 7,
    "top_p": 0.9,
    "temperature": 0.8,
    "max_attempts": 3,
    "require_known_label": False,
    "require_known_question": False,
    "balance_labels": False,
    "min_yield": 0.1,
}
VOTE: Tree = {
    "level": "block",
    "beta": 70,
    "attention_scope": "all",
    "max_examples": 4,
    "rationales": "gradient",
    "rationale_share": 0.3,
    "voting_tasks": "all",
    "top_k": 2,
    "shard_samples": 3,
    "min_margin": 0.2,
}
TRAIN: Tree = {
    "epochs": 3,
    "lr": 0.004,
    "weight_decay": 0.1,
    "warmup_ratio": 0.2,
    "max_grad_norm": 2.0,
    "global_batch": 9,
    "max_length": 17,
    "min_round_steps": 4,
    "keep": "last",
}
CTR: Tree = {
    "capsule_layers": 1,
    "capsule_mid": 7,
    "capsule_size": 4,
    "transfer_capsules": 4,
    "filters": 6,
    "kernels": [3, 4],
    "routing": "dynamic",
    "tsm_size": 25,
    "s_max": 51.0,
    "mask_mean": 0.1,
    "mask_std": 0.5,
    "mode": "backward_transfer",
    "sparsity": 0.5,
    "gate_lr": 0.03,
    "head_lr": 0.02,
    "share": False,
    "inherit": "previous",
    "routing_scope": "shared",
    "up_init": "zero",
    "sharing_lr": 0.01,
    "noise_share": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def base(folder: Path) -> Tree:
    return tiny.tree(folder, {"cluster": {"dispatcher": "ray", "engine": "deepspeed"}})


def opened(tree: Mapping[str, Any]) -> Run:
    return Run(parse(RunConfig, tree))


def fingerprints(tree: Mapping[str, Any]) -> dict[str, str]:
    run = opened(tree)
    stages = [stage for task in range(len(run.tasks)) for stage in run.plan(task)]
    return {run.ledger.key(ref(stage)): run.ledger.fingerprint(stage) for stage in stages}


def changed(base: Tree, over: Mapping[str, Any]) -> list[str]:
    """Return the stages whose fingerprint is another one with these settings laid over."""
    before, after = fingerprints(base), fingerprints(merged(base, over))
    assert before.keys() == after.keys()
    return [key for key in before if before[key] != after[key]]


def with_tasks(base: Tree, edit: Callable[[list[Any]], None]) -> Tree:
    tasks = json.loads(json.dumps(base["science"]["tasks"]))
    edit(tasks)
    return {"science": {"tasks": tasks}}


def update_second(tasks: list[Any], values: Tree) -> None:
    tasks[1] |= values


def fields(section: type[BaseModel], besides: tuple[str, ...] = ()) -> list[str]:
    return [name for name in section.model_fields if name not in besides]


@pytest.mark.parametrize("field", fields(ClusterConfig))
def test_no_cluster_setting_enters_a_fingerprint(base: Tree, field: str) -> None:
    value = CLUSTER[field]
    assert base["cluster"].get(field, ClusterConfig.model_fields[field].default) != value
    assert changed(base, {"cluster": {**BESIDE.get(field, {}), field: value}}) == []


@pytest.mark.parametrize("field", fields(RunSection))
def test_name_and_place_of_a_run_enter_no_fingerprint(base: Tree, field: str) -> None:
    assert base["run"].get(field) != RUN[field]
    assert changed(base, {"run": {field: RUN[field]}}) == []


@pytest.mark.parametrize(
    ("section", "place", "values"),
    [(ModelConfig, "model", MODEL), (TrainConfig, "train", TRAIN), (CtrConfig, "method", CTR)],
)
def test_every_setting_of_model_method_and_training_enters_all_fingerprints(
    base: Tree, section: type[Section], place: str, values: Tree
) -> None:
    for field in fields(section, besides=("source", "revision", "name")):
        assert changed(base, {"science": {place: {field: values[field]}}}) == ALL, field


def test_updates_at_their_defaults_are_another_method_than_none(base: Tree) -> None:
    lamol = merged(base, {"science": {"method": None}})
    digests = {}
    for name, lora in (("none", None), ("empty", {}), ("named", {"r": 8}), ("other", {"r": 4})):
        lamol["science"]["method"] = {"name": "lamol", "lora": lora}
        digests[name] = digest_of(parse(RunConfig, lamol).science.method.changed())
    assert digests["empty"] == digests["named"]
    assert len(set(digests.values())) == 3


def test_a_baseline_s_settings_enter_all_fingerprints(base: Tree) -> None:
    assert fields(FinetuneConfig) == ["name", "tune"]
    one = merged(base, {"science": {"method": None}})
    methods = ({"name": "sequential"}, {"name": "sequential", "tune": "head"}, {"name": "individual"})
    found = [fingerprints(merged(one, {"science": {"method": method}})) for method in methods]
    assert all(len({prints[key] for prints in found}) == 3 for key in ALL)


def test_the_seed_enters_all_fingerprints(base: Tree) -> None:
    assert changed(base, {"science": {"seed": 1}}) == ALL


def test_the_unit_of_scoring_enters_what_it_decides(base: Tree) -> None:
    assert fields(EvaluateConfig) == ["batch", "shard_rows"]
    assert changed(base, {"science": {"evaluate": {"shard_rows": 7}}}) == SCORES
    assert changed(base, {"science": {"evaluate": {"batch": 5}}}) == ALL  # dev rows select the weights of a task


def test_other_weights_under_the_same_name_change_everything(base: Tree, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(base["science"]["model"]["source"], source)
    before = fingerprints(merged(base, {"science": {"model": {"source": str(source)}}}))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    from cl_dist.models.digest import model_digest

    model_digest.cache_clear()  # a process reads a model once
    after = fingerprints(merged(base, {"science": {"model": {"source": str(source)}}}))
    assert all(before[key] != after[key] for key in ALL)


def test_training_settings_of_the_second_task_change_it_and_what_follows(base: Tree) -> None:
    for field in fields(TrainConfig):
        own = {"train": {field: TRAIN[field]}}
        assert changed(base, with_tasks(base, partial(update_second, values=own))) == LATER, field


@pytest.mark.parametrize(("split", "expected"), [("train", LATER), ("dev", LATER), ("test", SCORES[1:])])
def test_a_changed_row_of_the_second_task_changes_what_reads_it_and_what_follows(
    base: Tree, tmp_path: Path, split: str, expected: list[str]
) -> None:
    rows = tiny.rows("film", 20)
    next(row for row in rows if row["split"] == split)["text"] += " again"
    path = tiny.save_rows(tmp_path / "film.jsonl", rows)
    assert changed(base, with_tasks(base, lambda tasks: tasks[1]["source"].update(path=str(path)))) == expected


def test_the_place_of_a_data_file_enters_no_fingerprint(base: Tree, tmp_path: Path) -> None:
    path = shutil.copy(base["science"]["tasks"][1]["source"]["path"], tmp_path / "copy.jsonl")
    assert changed(base, with_tasks(base, lambda tasks: tasks[1]["source"].update(path=str(path)))) == []


def test_the_order_of_labels_enters_the_fingerprint(base: Tree) -> None:
    assert changed(base, with_tasks(base, lambda tasks: tasks[1].update(labels=["good", "bad"]))) == LATER


def test_data_rules_that_change_no_row_change_no_fingerprint(base: Tree) -> None:
    assert fields(DataConfig) == ["overlap"]
    assert changed(base, {"science": {"data": {"overlap": "error"}}}) == []


def test_row_limits_of_all_tasks_are_those_written_in_each_task(base: Tree) -> None:
    limits = {"train": 12, "dev": 4, "test": 6}
    each = merged(base, {"science": {"tasks": [{**task, "rows": limits} for task in base["science"]["tasks"]]}})
    once = merged(base, {"science": {"rows": limits}})
    assert fingerprints(once) == fingerprints(each) != fingerprints(base)
    sizes = [[len(data.train), len(data.dev), len(data.test)] for t in range(3) for data in [opened(once).data(t)]]
    assert sizes == [[12, 4, 6]] * 3


def test_row_limits_of_a_task_replace_those_of_all_tasks_key_by_key(base: Tree) -> None:
    edit = partial(update_second, values={"rows": {"train": 8, "test": None}})
    run = opened(merged(merged(base, {"science": {"rows": {"train": 12, "test": 6}}}), with_tasks(base, edit)))
    assert [(len(run.data(t).train), len(run.data(t).test)) for t in range(3)] == [(12, 6), (8, 10), (12, 6)]
    assert run.config.tree()["science"]["tasks"][1]["rows"] == {"train": 8, "test": None}


def test_row_limits_of_all_tasks_apply_to_baselines(base: Tree) -> None:
    over: Tree = {"science": {"rows": {"train": 12}}, "baselines": {"b": {"rows": {"train": 8}}, "c": {"seed": 1}}}
    config = parse(RunConfig, merged(base, over))
    assert [Run(config.baseline(name)).tasks.tasks[0].rows.train for name in "bc"] == [8, 12]


def test_tasks_in_another_order_change_what_comes_from_there_on(base: Tree) -> None:
    before = fingerprints(base)
    after = fingerprints(merged(base, {"science": {"order": ["food", "topic", "film"]}}))
    assert {key for key in after if after[key] in before.values()} == set(ALL[:2])


@pytest.mark.parametrize("method", [dict(tiny.CTR), {"name": "sequential"}, {"name": "individual"}])
def test_a_task_appended_to_the_order_changes_no_earlier_fingerprint(base: Tree, method: Tree) -> None:
    whole = merged(base, {"science": {"method": None}})
    whole["science"]["method"] = method
    first_two = fingerprints(merged(whole, {"science": {"order": ["food", "film"]}}))
    assert list(first_two) == ALL[:4]
    assert {key: fingerprints(whole)[key] for key in first_two} == first_two


def test_how_an_order_is_written_enters_no_fingerprint(base: Tree, tmp_path: Path) -> None:
    file = tmp_path / "orders.txt"
    file.write_text("\n".join(TASKS))
    assert changed(base, {"science": {"order": list(TASKS)}}) == []
    assert changed(base, {"science": {"orders": {"a": list(TASKS)}, "order": "a"}}) == []
    assert changed(base, {"science": {"order_file": str(file)}}) == []


def test_defaults_written_out_change_no_fingerprint(base: Tree) -> None:
    explicit = parse(RunConfig, base).model_dump(mode="json")
    assert len(json.dumps(explicit)) > len(json.dumps(base))
    assert changed(base, explicit) == []


def test_every_field_of_science_is_decided_upon() -> None:
    """A field that is added needs a test here: of what it changes, or that it changes nothing."""
    tested = "schema_version seed model method tasks orders order_file order rows train evaluate generate data"
    assert set(Science.model_fields) == set(tested.split())


def test_settings_of_writing_enter_the_stages_from_the_second_task_on(tmp_path: Path) -> None:
    base = tiny.tree(tmp_path, {"science": {"method": dict(tiny.METHODS["lamol"])}})
    writing = [key for key in fingerprints(base) if not key.startswith("00-")]
    assert "01-film/generate" in writing
    for field in fields(GenerateConfig):
        assert changed(base, {"science": {"generate": {field: GENERATE[field]}}}) == writing, field
    other = with_tasks(base, partial(update_second, values={"question": "what is it ?"}))
    assert changed(base, other) == [key for key in writing if key != "01-film/generate"]


def test_settings_of_votes_enter_votes_and_what_follows(tmp_path: Path) -> None:
    base = tiny.tree(tmp_path, {"science": {"method": dict(tiny.METHODS["rational_lamol"])}})
    for field in fields(VoteConfig):
        found = changed(base, {"science": {"method": {field: VOTE[field]}}})
        assert {"01-film/record", "01-film/vote", "01-film/train", "02-topic/evaluate"} <= set(found), field
    rationales = base["science"]["tasks"][0] | {"rationale": None}
    tasks = [rationales, *base["science"]["tasks"][1:]]
    found = changed(base, {"science": {"tasks": tasks}})
    assert "01-film/record" in found
    assert "00-food/train" not in found


def test_inputs_are_named_by_their_folder_and_enter_as_fingerprints(base: Tree) -> None:
    run = Run(parse(RunConfig, base))
    train, score = run.plan(1)
    first, _ = run.plan(0)
    assert run.facts(train)["inputs.00-food/train"] == run.ledger.fingerprint(first)
    assert run.facts(score)["inputs.01-film/train"] == run.ledger.fingerprint(train)


def test_a_job_knows_the_tasks_so_far_and_the_weights_it_starts_from(base: Tree) -> None:
    run = Run(parse(RunConfig, base))

    def chain(stage: Stage) -> list[str]:
        return [Path(folder).relative_to(run.ledger.folder.absolute()).as_posix() for folder in run.job(stage).chain]

    train, score = run.plan(2)
    assert isinstance(train, Train)
    assert chain(train) == ["stages/00-food/train", "stages/01-film/train"]
    assert chain(score) == [*chain(train), "stages/02-topic/train"]
    assert [task.id for task in run.job(run.plan(1)[0]).tasks] == ["food", "film"]
    assert run.job(train).engine == run.config.cluster


def test_a_moved_backbone_is_the_same_backbone(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    assert model_digest(str(here), None) == model_digest(str(there), None)
    moved = [model_facts(ModelConfig(source=str(folder))) for folder in (here, there)]
    assert moved[0] == moved[1]
    (there / "model.safetensors").write_bytes(b"others")
    model_digest.cache_clear()
    assert model_facts(ModelConfig(source=str(there))) != moved[0]
    assert model_facts(ModelConfig(source=str(here), pooling="cls")) != moved[0]
