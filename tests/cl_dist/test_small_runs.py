"""Runs in one process without Ray, and runs cut down to a few rows."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist import session
from cl_dist.config import Tree, merged, parse
from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import ConfigError
from cl_dist.run import Run
from cl_dist.run_config import RunConfig, read_run_file
from cl_dist.run_events import read_state
from cl_dist.small_runs import smoke, without_ray
from cl_dist.stage import ref
from launcher.runs import recipes

BASELINES: Tree = {"plain": {"method": {"name": "sequential"}, "train": {"epochs": 3}}}
ON_RAY: Tree = {"dispatcher": "ray", "engine": "deepspeed", "workers": 2, "min_workers": 1}


def fingerprints(config: RunConfig) -> list[str]:
    run = Run(config)
    return [run.ledger.fingerprint(stage) for stage in run.stages()]


def test_a_local_run_keeps_every_fingerprint(tmp_path: Path) -> None:
    config = parse(RunConfig, tiny.tree(tmp_path, {"cluster": ON_RAY, "baselines": BASELINES}))
    local = without_ray(config)
    found = local.cluster
    assert (found.dispatcher, found.engine, found.workers, found.min_workers) == ("local", "torch", 1, None)
    assert fingerprints(local) == fingerprints(config)
    assert fingerprints(local.baseline("plain")) == fingerprints(config.baseline("plain"))


@pytest.mark.parametrize("over", [{"model": {"dtype": "bfloat16"}}, {}])
def test_bfloat16_needs_deepspeed_also_without_ray(tmp_path: Path, over: Tree) -> None:
    baselines = {} if over else {"half": {"model": {"dtype": "bfloat16"}}}
    tree = tiny.tree(tmp_path, {"science": over, "cluster": ON_RAY, "baselines": baselines})
    found = without_ray(parse(RunConfig, tree)).cluster
    assert (found.dispatcher, found.engine, found.workers) == ("local", "deepspeed", 1)


@pytest.mark.parametrize("recipe", ["ctr-demo", "lamol-mini", "rational-lamol-mini"])
def test_recipes_run_locally_and_cut_down(recipe: str) -> None:
    config = read_run_file(recipes()[recipe])
    cut = without_ray(smoke(config))
    assert cut.run.name == f"{recipe}-smoke"
    for each in (cut, *(cut.baseline(name) for name in cut.baselines)):
        assert each.cluster.dispatcher == "local"
        assert {(t.rows.train, t.rows.dev, t.rows.test) for t in each.science.sequence().tasks} == {(30, 30, 30)}
        assert {each.science.train_of(task).epochs for task in each.science.tasks} == {1}
        assert each.science.generate.min_yield == 0.0
    assert cut.baselines.keys() == config.baselines.keys()


def test_smaller_limits_and_balance_stay_in_a_smoke_run(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {"rows": {"train": 9, "test": 99, "balance": ["train"]}}})
    tree["science"]["tasks"][1] |= {"train": {"epochs": 40, "lr": 0.5}, "rows": {"dev": 2}}
    tree["baselines"] = {"b": {"tasks": tree["science"]["tasks"][1:], "rows": {"train": 5000}}}
    cut = smoke(parse(RunConfig, tree))
    assert cut.run.name == "tiny-smoke"
    rows = [task.rows for task in cut.science.sequence().tasks]
    assert [(r.train, r.dev, r.test) for r in rows] == [(9, 30, 30), (9, 2, 30), (9, 30, 30)]
    assert all(r.balances("train") for r in rows)
    assert (cut.science.train_of(cut.science.tasks[1]).epochs, cut.science.train_of(cut.science.tasks[1]).lr) == (
        1,
        0.5,
    )
    assert [task.rows.train for task in cut.baseline("b").science.sequence().tasks] == [30, 30]


def test_a_method_that_trains_models_of_its_own_does_so_for_one_epoch(tmp_path: Path) -> None:
    method = {**tiny.METHODS["rational_lamol"], "rationales": "invrat", "invrat": {"restarts": 2}}
    cut = smoke(parse(RunConfig, tiny.tree(tmp_path, {"science": {"method": method}})))
    found: Any = cut.science.method
    assert (found.invrat.train.epochs, found.invrat.restarts) == (1, 2)


@pytest.mark.parametrize("name", ["ctr", "lamol", "rational_lamol"])
def test_a_smoke_run_of_a_method_ends(tmp_path: Path, name: str) -> None:
    over = {"science": {"method": dict(tiny.METHODS[name]), "generate": {"min_yield": 1.0}}, "baselines": BASELINES}
    if name != "ctr":
        over["baselines"] = {"real": {"method": {"name": "lamol_real"}}}
    tree = tiny.tree(tmp_path, over, tasks=("food", "film"))
    found = session.train(merged(tree, {"cluster": ON_RAY}), local=True, smoke=True)
    assert found.folder.name == "tiny-smoke"
    assert [line.status for line in found.progress()] == ["finished"] * 2


def test_local_workers_get_the_threads_that_the_run_file_reserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    over = {"cluster": {"cpus_per_worker": 3}, "baselines": {}}
    config = tiny.tree(tmp_path, over, tasks=("food",))

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            seen.append(torch.get_num_threads())

    session.train(config, watch=watch)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    dispatcher = LocalDispatcher(threads=3)
    assert torch.get_num_threads() == before
    dispatcher.close()


def test_resume_leaves_out_baselines_that_train_has_left_out(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"baselines": BASELINES}, tasks=("food",))
    folder = session.train(tree, baselines=False).folder
    assert read_state(folder)["baselines"] is False
    session.resume(folder, overrides=["cluster.checkpoint_minutes=5"])
    assert not (folder / "baselines").exists()
    session.resume(folder, baselines=True)
    assert (folder / "baselines" / "plain" / "run.json").exists()
    assert read_state(folder)["baselines"] is True
    assert ref(next(Run(read_run_file(folder / "config.yaml")).stages())).stage == "train"


def test_a_local_run_refuses_nothing_that_the_run_file_has(tmp_path: Path) -> None:
    gang = {"workers": 4, "workers_per_model": 2, "gpus_per_worker": 1, "offload": "optimizer", "zero_stage": 2}
    config = parse(RunConfig, tiny.tree(tmp_path, {"cluster": {"dispatcher": "ray", "engine": "deepspeed", **gang}}))
    found = without_ray(config).cluster
    assert (found.workers, found.workers_per_model, found.offload) == (1, 1, None)
    with pytest.raises(ConfigError, match=r"workers=4 is not supported with dispatcher: local"):
        parse(RunConfig, merged(config.tree(), {"cluster": {"dispatcher": "local", "workers_per_model": 1}}))
