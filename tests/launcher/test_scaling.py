"""The paper's arithmetic, by hand."""

from dataclasses import replace

import pytest

from launcher.scaling import Machine, Work, on_paper

MACHINE = Machine(peak=1e12, used=0.5, inside=100e9, between=10e9, gpus=8)
WORK = Work(
    elements=1000,
    trained=100,
    item=2,
    global_batch=64,
    tokens=10,
    zero_stage=2,
    most_rows=4,
    recomputes=False,
)


def test_operations_and_seconds_of_a_step() -> None:
    (eight,) = on_paper(WORK, MACHINE, (8,))
    assert eight["rows"] == 8
    assert eight["compute_s"] == 8 * 10 * (4 * 1000 + 2 * 100) / 0.5e12
    assert eight["moved_bytes"] == 2 * 3 * 100 * 7 // 8  # two micro-batches reduced, one gathering
    assert eight["link_s"] == eight["moved_bytes"] / 100e9
    assert eight["step_s"] == eight["compute_s"] + eight["link_s"]
    assert eight["least_s"] == max(eight["compute_s"], eight["link_s"])
    assert eight["tokens_per_s"] == pytest.approx(640 / eight["step_s"])


@pytest.mark.parametrize(("stage", "elements"), [(0, 200), (1, 200), (2, 300), (3, 2 * 2100)])
def test_bytes_by_zero_stage(stage: int, elements: int) -> None:
    (eight,) = on_paper(replace(WORK, zero_stage=stage), MACHINE, (8,))
    assert eight["moved_bytes"] == 2 * elements * 7 // 8


def test_recomputing_costs_another_forward_pass() -> None:
    plain, again = (next(on_paper(replace(WORK, recomputes=on), MACHINE, (8,))) for on in (False, True))
    assert again["compute_s"] / plain["compute_s"] == pytest.approx(6200 / 4200)


def test_more_nodes_use_the_slower_link_and_more_ranks_than_rows_idle() -> None:
    eight, sixteen, many = on_paper(replace(WORK, zero_stage=3), MACHINE, (8, 16, 128))
    assert eight["link_s"] < sixteen["link_s"]
    assert sixteen["share_of_first"] < 1
    assert "links take longer" in sixteen["note"]
    assert many["rows"] == 1
    assert "64 ranks have no row" in many["note"]
