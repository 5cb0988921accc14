"""The memory that a plan tells is within 15 % of the most bytes that tensors hold."""

from pathlib import Path

import pytest

from cl_dist.config import Tree
from tests import memory

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
BUDGET = 0.15


def within(line: Tree) -> bool:
    ratio = line["told"] / line["measured"]
    gang = f"{line['workers']} worker(s), ZeRO {line['zero_stage']}, micro_batch {line['micro_batch']}"
    print(
        f"{line['what']}: {gang}: told {line['told'] / 2**20:.1f} MiB, held {line['measured'] / 2**20:.1f}: {ratio:.3f}"
    )
    return abs(ratio - 1) <= BUDGET


@pytest.mark.parametrize("name", ["sequential", "ctr", "lamol"])
def test_a_rank_holds_what_the_plan_tells_while_it_trains(tmp_path: Path, name: str) -> None:
    lines = list(memory.training(tmp_path, name))
    assert len(lines) == 2 * len(memory.GANGS)
    assert [line for line in lines if not within(line)] == []


@pytest.mark.parametrize("name", memory.POOLED)
def test_caches_and_statistics_are_what_the_plan_tells(tmp_path: Path, name: str) -> None:
    lines = list(memory.pooled(tmp_path, name))
    assert [line["what"] for line in lines] == [f"{name}, {kind}" for kind in memory.POOLED[name]]
    assert [line for line in lines if not within(line)] == []
