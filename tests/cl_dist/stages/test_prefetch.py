"""Micro-batches are prepared ahead of the step that uses them: in order, bounded, and without a thread that stays."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_dist.contract import tiny
from cl_dist.data.classify import ClassifyRows
from cl_dist.data.sampler import global_batch, num_steps, share
from cl_dist.errors import StoppedError
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.world import World
from cl_dist.stage import Train
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.prefetch import Prefetch, Split, micro_batches
from cl_dist.stages.stage_job import Job

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def counting(taken: list[int], end: int, fails_at: int | None = None) -> Iterator[int]:
    for number in range(end):
        if number == fails_at:
            raise ValueError(f"item {number}")
        taken.append(number)
        yield number


def test_items_come_in_order_and_then_end() -> None:
    assert list(Prefetch(iter(range(20)), CPU)) == list(range(20))
    assert list(Prefetch(iter(()), CPU)) == []
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 2])
def test_no_more_than_the_bound_is_prepared(ahead: int) -> None:
    taken: list[int] = []
    items = Prefetch(counting(taken, 10), CPU, ahead)
    for used in range(5):
        deadline = time.monotonic() + 30
        while len(taken) < used + ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02)
        assert len(taken) == used + ahead
        assert next(items) == used
    items.close()
    assert len(taken) <= 5 + ahead
    assert threads() == []


def test_an_item_is_prepared_while_the_one_before_is_in_use() -> None:
    taken: list[int] = []
    items = Prefetch(counting(taken, 3), CPU, 1)
    assert next(items) == 0
    deadline = time.monotonic() + 30
    while len(taken) < 2 and time.monotonic() < deadline:  # without another call of next
        time.sleep(0.01)
    assert taken == [0, 1]
    items.close()


def test_an_error_of_the_source_is_raised_in_its_place() -> None:
    items = Prefetch(counting([], 10, fails_at=3), CPU)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(items)
    assert list(items) == []
    items.close()
    assert threads() == []


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A stage of 10 steps in global batches of 8, the last of an epoch with 4 rows."""
    train_settings = {"epochs": 4, "min_round_steps": 3}
    science = {"method": {"name": "sequential"}, "train": train_settings}
    run = tiny.make_run(tmp_path_factory.mktemp("prefetch"), {"science": science}, tasks=("food",))
    return run.job(run.plan(0)[0])


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_micro_batches_are_those_of_the_sampler(job: Job, world: int, first: int) -> None:
    stage = job.stage
    assert isinstance(stage, Train)
    rows, _ = train._rows(job, stage, build_learner(job))
    job = replace(job, engine=EngineConfig(micro_batch=2))
    for rank in range(world):
        here = World(rank, world, CPU)
        split = Split.of(job, here)
        assert (split.micro, split.num_micro) == (2, {1: 4, 3: 2}[world])
        found = micro_batches(job, rows, range(first, 9), here, split)
        for step in range(first, 9):
            _, indices = global_batch(job.seed, "food", step, 20, 8)
            assert len(indices) == (4 if step % num_steps(20, 8) == 2 else 8)
            for places in share(np.array(rows.by_length(indices)), rank, world, 2, split.num_micro):
                micro = next(found)
                assert (micro.step, micro.examples) == (step, len(indices))
                assert micro.tokens == sum(rows.length(int(number)) for number in indices)
                expected = rows.batch(places)
                assert expected.keys() == micro.inputs.keys()
                assert all(torch.equal(micro.inputs[name], value) for name, value in expected.items())
        assert next(found, None) is None


@pytest.mark.parametrize("how", ["ends", "stops", "raises", "cannot collate"])
def test_no_thread_outlives_the_stage(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    steps: list[int] = []

    def heartbeat(step: int) -> None:
        steps.append(step)
        if step:
            assert len(threads()) == 1  # the steps do run on batches that were prepared
        if how == "raises" and step == 4:
            raise KeyError("planted")

    if how == "cannot collate":
        collate = ClassifyRows.batch

        def broken(self: ClassifyRows, places: object, *args: object) -> object:
            if threading.current_thread().name.startswith("prefetch") and steps and steps[-1] >= 4:
                raise IndexError("planted")
            return collate(self, places, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(ClassifyRows, "batch", broken)
    monkeypatch.setattr("cl_dist.stages.save_policy.POLL_S", 0.0)
    error = {"stops": StoppedError, "raises": KeyError, "cannot collate": IndexError}.get(how)
    if error is None:
        train.run(job, tmp_path, lambda event: None, heartbeat=heartbeat)
        assert steps == list(range(13))
    else:
        with pytest.raises(error):
            train.run(job, tmp_path, lambda event: None, lambda: "stop" if how == "stops" else "", heartbeat)
        assert len(steps) < 13
    assert threads() == []
