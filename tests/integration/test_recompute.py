"""Activations that are computed again change no result: every method here, and under ZeRO-3 on two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.run import Run
from cl_dist.stage import StageRef, Train
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests.parity import train_here

pytestmark = pytest.mark.timeout(300)


def made(folder: Path, method: str) -> Job:
    """Return the second task's training, after a first one."""
    settings = dict(tiny.TEXT_TRAIN) if tiny.writes(method) else {"epochs": 3}
    science: dict[str, Any] = {"method": dict(tiny.METHODS[method]), "train": settings}
    run: Run = tiny.make_run(folder, {"science": science}, tasks=("food", "film"))
    for stage in run.plan(0):
        if isinstance(stage, Train):
            train_here(run.job(stage), run.ledger.path(StageRef(task=0, stage=stage.name)))
    stage = next(stage for stage in reversed(run.plan(1)) if isinstance(stage, Train))
    return run.job(stage.model_copy(update={"samples": None, "frozen": None}))


def again(job: Job, **engine: Any) -> Job:
    return replace(job, engine=job.engine.model_copy(update={"activation_checkpointing": True, **engine}))


@pytest.mark.parametrize("method", ["ctr", "hat", "lora", "ewc", "lamol", "rational_lamol", "sequential"])
def test_a_stage_ends_the_same(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = made(tmp_path, method)
    whole = train_here(job, tmp_path / "whole").weights
    forwards: list[int] = []
    plain = nn.LayerNorm.forward

    def counted(self: nn.LayerNorm, hidden: Tensor) -> Tensor:
        forwards.append(1)
        return plain(self, hidden)

    monkeypatch.setattr(nn.LayerNorm, "forward", counted)
    train_here(job, tmp_path / "once")
    once, forwards[:] = len(forwards), []
    found = train_here(again(job), tmp_path / "again").weights
    assert len(forwards) > 1.2 * once  # dev rows are scored once
    torch.testing.assert_close(found, whole, rtol=0.0, atol=1e-6)


def test_under_zero_3_too(tmp_path: Path, ranks: Ranks) -> None:
    job = made(tmp_path, "ctr")
    whole = train_here(job, tmp_path / "whole").weights
    (tmp_path / "out").mkdir()
    ranks.run(_train, again(job, engine="deepspeed", zero_stage=3), str(tmp_path / "out"), timeout_s=150.0)
    torch.testing.assert_close(dict(ShardedWeights(tmp_path / "out")), whole, rtol=0.0, atol=1e-5)


def _train(rank: int, world: int, job: Job, out: str) -> None:
    from cl_dist.stages import train

    train.run(job, Path(out), lambda event: None)
