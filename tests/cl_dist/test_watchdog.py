"""A rank that hangs ends itself with its stacks in its log; an error quotes the logs, the first silent one first."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.contract import tiny
from cl_dist.dispatch_ray.pool import ACTOR, ShardWorker
from cl_dist.dispatch_ray.ranks import _log_to
from cl_dist.dispatch_ray.watchdog import Watchdog, log_tails, remedy
from cl_dist.stages import evaluate
from cl_dist.stages.stage_job import Job


def stuck_in_a_collective() -> None:
    time.sleep(60)


def _rank(folder: str, hangs: bool, before: bool) -> None:
    with Watchdog(1.0, _log_to(Path(folder) / f"rank-{int(hangs)}.log")) as alive:
        if hangs and before:
            stuck_in_a_collective()
        for step in range(4):
            alive(step)
            time.sleep(0.4)  # longer in all than a step may take, but no single one
        if hangs:
            alive(4)
            stuck_in_a_collective()
    time.sleep(3.0)  # nothing is watched any more


@pytest.mark.parametrize("before", [False, True], ids=["in a step", "before the first"])
def test_a_rank_that_hangs_ends_with_its_stacks_in_the_log(tmp_path: Path, before: bool) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(str(tmp_path), hangs, before)) for hangs in (False, True)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 1]
    text = (tmp_path / "rank-1.log").read_text()
    assert before or "alive step=0 peak_memory_gb=" in text
    assert "stuck_in_a_collective" in text
    assert "Timeout (" not in (tmp_path / "rank-0.log").read_text()
    words = log_tails(tmp_path, range(3))
    assert "stuck_in_a_collective" in words
    assert before or "alive step=" in words
    assert "cluster.progress_timeout_s" in remedy(words)


class Hanging:
    """A worker on shards that never comes back."""

    def __init__(self, job: Job) -> None:
        pass

    def run(self, shard: Any) -> Any:
        stuck_in_a_collective()


def _actor(folder: str, job: Job) -> None:
    evaluate.KIND = replace(evaluate.KIND, worker=Hanging)
    ShardWorker(3, folder, None, {}).run("once", job, "the first shard", f"{folder}/logs", 1.0)


def test_an_actor_that_hangs_on_a_shard_ends_with_its_stacks_in_a_log(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"science": {"method": {"name": "sequential"}}}, tasks=("food",))
    job = run.job(run.plan(0)[-1])
    actor = multiprocessing.get_context("spawn").Process(target=_actor, args=(str(tmp_path), job))
    actor.start()
    actor.join(60)
    assert actor.exitcode == 1
    words = log_tails(tmp_path / "logs", [3], ACTOR)
    assert "stuck_in_a_collective" in words
    assert "00-food/evaluate: the first shard" in (tmp_path / "logs" / "actor-3.log").read_text()


def test_the_rank_that_fell_silent_first_is_quoted_first(tmp_path: Path) -> None:
    for rank, age in ((0, 5), (1, 60), (2, 0)):
        path = tmp_path / f"rank-{rank}.log"
        path.write_text("".join(f"line {number}\n" for number in range(50)) + f"last of rank {rank}\n")
        os.utime(path, (time.time() - age, time.time() - age))
    words = log_tails(tmp_path, range(3))
    places = [words.index(f"last of rank {rank}") for rank in (1, 0, 2)]
    assert places == sorted(places)
    assert "line 2\n" not in words  # the ends alone
    assert log_tails(tmp_path / "absent", range(3)) == ""


def test_a_hang_before_the_last_start_is_not_what_ended_a_rank(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("train start\nTimeout (0:00:01)!\n  File old stack\ntrain start task=1\nalive step=7\n")
    (tmp_path / "rank-5.log").write_text("of a larger gang\n")
    words = log_tails(tmp_path, range(2))
    assert "alive step=7" in words
    assert "old stack" not in words
    assert "larger" not in words
