"""Frozen heads and blocks on two ranks: bit-equal through decay, clipping, accumulation and bfloat16, ZeRO 0 to 3."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import ProtectionError
from cl_dist.parallel import engine
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.stage import StageRef, Train
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests.parity import Cell, train_here

pytestmark = pytest.mark.timeout(300)
TRAIN = {"epochs": 3, "weight_decay": 0.1, "max_grad_norm": 0.5}
LORA = {"r": 4, "target_modules": ["c_attn", "c_proj"]}


def frozen_job(folder: Path, over: dict[str, Any]) -> Job:
    """Return the second task's training with one unit frozen, after a first one."""
    frozen = {"freeze": "list", "frozen_units": [[1, 0]], "freeze_output": True}
    method = {**tiny.METHODS["rational_lamol"], **frozen, **over}
    run = tiny.make_run(folder, {"science": {"method": method, "train": TRAIN}}, tasks=("food", "film"))
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    stage = next(stage for stage in run.plan(1) if isinstance(stage, Train))
    return run.job(stage.model_copy(update={"samples": None}))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The second task's training, by level; "lora ..." with low-rank updates."""
    return {
        f"{'lora ' * (lora is not None)}{level}": frozen_job(
            tmp_path_factory.mktemp(level), {"level": level, "lora": lora}
        )
        for level in ("block", "head")
        for lora in (None, LORA)
    }


def _train(rank: int, world: int, job: Job, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


def _train_without_putting_back(rank: int, world: int, job: Job, out: str) -> None:
    put_back = engine._FrozenEntries.put_back
    engine._FrozenEntries.put_back = lambda self: None  # type: ignore[method-assign]
    try:
        train.run(job, Path(out), lambda event: None)
    finally:
        engine._FrozenEntries.put_back = put_back  # type: ignore[method-assign]


FLOAT, BRAIN = "float32", "bfloat16"
CELLS: list[tuple[Any, str]] = [(stage, FLOAT) for stage in (0, 1, 2, 3)] + [(stage, BRAIN) for stage in (1, 2, 3)]


@pytest.mark.parametrize("level", ["block", "head", "lora block", "lora head"])
@pytest.mark.parametrize(("zero_stage", "dtype"), CELLS)
def test_what_is_frozen_keeps_every_bit(
    ranks: Ranks, jobs: dict[str, Job], tmp_path: Path, level: str, zero_stage: Any, dtype: Any
) -> None:
    cell = Cell("rational_lamol", zero_stage, 2, 2).engine.model_copy(update={"verify_protection_every": 1})
    job = replace(jobs[level], engine=cell, model=jobs[level].model.model_copy(update={"dtype": dtype}))
    out = tmp_path / "out"
    out.mkdir()
    ranks.run(_train, job, str(out), timeout_s=200.0)
    after, before = ShardedWeights(out), ShardedWeights(job.chain[-1])
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    facts = json.loads((out / "train.json").read_text())
    total = sum(parameter.numel() for parameter in learner.model.parameters())
    trained = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad)
    assert facts["parameters"] == {"trainable": trained, "total": total}
    assert trained < total / 3 or "lora" not in level
    assert 0.05 < facts["learner"]["freeze/params_frac"] < 0.5
    if level.endswith("block"):
        assert not any(".h.1." in name for name in after)
        assert any(".h.0." in name for name in after)
        return
    held = {name: scale for name, scale in learner.gradient_transforms().items() if scale.decay}
    assert held
    for name, scale in held.items():
        kept = frozen_entries(scale, before[name])
        assert torch.equal(after[name][kept], before[name][kept])
        assert bool(kept.all()) or not torch.equal(after[name][~kept], before[name][~kept])


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_decay_that_is_not_undone_is_noticed(
    ranks: Ranks, jobs: dict[str, Job], tmp_path: Path, zero_stage: Any
) -> None:
    cell = Cell("rational_lamol", zero_stage, 2, 1).engine.model_copy(update={"verify_protection_every": 1})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ProtectionError, match=r"step 1: protected entries have changed in .*attn\.c_attn"):
        ranks.run(_train_without_putting_back, replace(jobs["head"], engine=cell), str(out), timeout_s=200.0)
