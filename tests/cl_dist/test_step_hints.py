import logging
from pathlib import Path
from typing import Any

import pytest

from cl_dist import session
from cl_dist.checks import step_hints
from cl_dist.contract import tiny
from cl_dist.methods import method_config
from cl_dist.methods.hat import HatConfig
from cl_dist.planning.planner import planned


def hints(folder: Path, method: dict[str, Any], **train: Any) -> list[str]:
    over = {"science": {"method": method, "train": {"global_batch": 10, "min_round_steps": 1, **train}}}
    return [str(hint) for hint in step_hints(tiny.make_run(folder, over))]


def test_gates_need_the_steps_in_which_they_can_move_by_their_initial_spread() -> None:
    # the rate falls linearly to 0: N steps of AdamW move an embedding by about N * 0.02 / 2 at most, 1 for N = 100
    assert HatConfig(name="hat").gate_steps == 100
    assert HatConfig(name="hat", gate_lr=0.1, mask_std=0.5).gate_steps == 10


def test_tasks_with_too_few_steps_get_one_hint_by_number_of_steps(tmp_path: Path) -> None:
    method = {"name": "hat", "tsm_size": 8}
    assert hints(tmp_path, method, epochs=4) == [
        "tasks food, film, topic: 8 optimizer steps; masks hardly move below 100; raise train.epochs to 50, or lower "
        "train.global_batch"
    ]
    assert hints(tmp_path, {**method, "gate_lr": 0.25}, epochs=4) == []
    over = {"science": {"method": method, "train": {"global_batch": 10}}}
    run = tiny.make_run(tmp_path, over)
    run.science.tasks[1].train["epochs"] = 50
    found = [str(hint) for hint in step_hints(run)]
    assert all("film" not in hint for hint in found)


@pytest.mark.parametrize("name", ["sequential", "individual", "adapter", "lora", "lamol"])
def test_methods_without_gates_get_no_hint(tmp_path: Path, name: str) -> None:
    assert hints(tmp_path, dict(tiny.METHODS[name]), epochs=1) == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [({}, "masks and routers"), ({"share": False}, "masks"), ({"routing": "none"}, "masks")],
)
def test_the_hint_names_the_parts_that_the_method_has(tmp_path: Path, settings: dict[str, Any], parts: str) -> None:
    method = {**tiny.METHODS["ctr"], **settings}
    assert method_config("ctr", method)
    (hint,) = hints(tmp_path, method, epochs=1)
    assert f"; {parts} hardly move below 100;" in hint


def test_the_plan_and_the_start_of_training_give_the_hint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    over = {"science": {"method": {"name": "hat", "tsm_size": 8}, "train": {"epochs": 1, "min_round_steps": 1}}}
    tree = tiny.tree(tmp_path, over, tasks=("food",))
    (hint,) = planned(tiny.make_run(tmp_path, over, tasks=("food",)).config, with_memory=False).hints
    with caplog.at_level(logging.WARNING, logger="cl_dist.session"):
        session.train(tree)
        assert caplog.text.count(hint) == 1
        session.train(tree)
    assert caplog.text.count(hint) == 1  # nothing is left to train
