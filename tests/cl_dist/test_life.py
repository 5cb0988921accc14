"""A rank that hangs ends itself with its stacks in its log; an error quotes the logs, the first silent one first."""

import multiprocessing
import os
import time
from pathlib import Path

from cl_dist.dispatch_ray.life import Alive, last_words
from cl_dist.dispatch_ray.ranks import _log_to


def stuck_in_a_collective() -> None:
    time.sleep(60)


def _rank(folder: str, hangs: bool) -> None:
    alive = Alive(1.0, _log_to(Path(folder) / f"rank-{int(hangs)}.log"))
    for step in range(4):
        alive(step)
        time.sleep(0.4)  # longer in all than a step may take, but no single one
    if hangs:
        alive(4)
        stuck_in_a_collective()
    alive(None)
    time.sleep(3.0)  # nothing is watched any more


def test_a_rank_that_hangs_ends_with_its_stacks_in_the_log(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(str(tmp_path), hangs)) for hangs in (False, True)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 1]
    text = (tmp_path / "rank-1.log").read_text()
    assert "alive step=0 peak_memory_gb=" in text
    assert "stuck_in_a_collective" in text
    assert "Timeout (" not in (tmp_path / "rank-0.log").read_text()
    words = last_words(tmp_path, 3)
    assert "stuck_in_a_collective" in words
    assert "alive step=" in words


def test_the_rank_that_fell_silent_first_is_quoted_first(tmp_path: Path) -> None:
    for rank, age in ((0, 5), (1, 60), (2, 0)):
        path = tmp_path / f"rank-{rank}.log"
        path.write_text("".join(f"line {number}\n" for number in range(50)) + f"last of rank {rank}\n")
        os.utime(path, (time.time() - age, time.time() - age))
    words = last_words(tmp_path, 3)
    places = [words.index(f"last of rank {rank}") for rank in (1, 0, 2)]
    assert places == sorted(places)
    assert "line 2\n" not in words  # the ends alone
    assert last_words(tmp_path / "absent", 3) == ""


def test_a_hang_before_the_last_start_is_not_what_ended_a_rank(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("train start\nTimeout (0:00:01)!\n  File old stack\ntrain start task=1\nalive step=7\n")
    (tmp_path / "rank-5.log").write_text("of a larger gang\n")
    words = last_words(tmp_path, 2)
    assert "alive step=7" in words
    assert "old stack" not in words
    assert "larger" not in words
