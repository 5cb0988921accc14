"""The contract suite over the methods of cl-dist, and expectations that are known of them alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist.contract import parity, tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.contract.test_contract import *  # noqa: F403
from cl_dist.contract.test_contract import Runs, difference
from cl_dist.methods import METHODS
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.stages import train
from cl_dist.stages.build import build_learner


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    pool = Ranks(world=3)
    yield pool
    pool.close()


def test_every_method_has_settings_to_be_tested_with() -> None:
    assert set(tiny.METHODS) == set(METHODS)
    for name, settings in tiny.METHODS.items():
        assert METHODS[name].config.model_validate(dict(settings)).name == name


@pytest.mark.parametrize("known", ["ctr", "ewc"])
def test_three_workers_train_what_one_does_where_they_divide_nothing_evenly(
    three: Ranks, runs: Runs, tmp_path: Path, known: str
) -> None:
    found = difference(runs, three, parity.Cell(known, 3, workers=3, accumulation=2), tmp_path)
    assert found["weights"] <= 1e-5, found
    assert found["mask_bits"] == 0, found


def test_methods_with_masks_freeze_entries(runs: Runs, method: str) -> None:
    """Else the test of what may not move would pass without looking at an entry."""
    job = runs.job(method, "train")
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    named = dict(learner.model.named_parameters())
    masked = any(bool(frozen_entries(t, named[n]).any()) for n, t in learner.gradient_transforms().items())
    assert masked == (method in {"ctr", "hat", "lamol", "lamol_real", "rational_lamol"})
