"""Runs on Ray that are stopped, killed and resumed, against an undisturbed one."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration import ray_runs
from tests.integration.ray_runs import Command, events, is_alive, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Story:
    """What was seen of the run, attempt by attempt."""

    run: Path
    stopped_code: int
    stopped: Mapping[str, Any]
    """`cl-dist status --json` after SIGTERM."""
    killed: Mapping[str, Any]
    """`cl-dist status --json` after SIGKILL."""
    family: Mapping[int, str]
    """Processes of the driver when it was killed."""
    left: list[str]
    """Those that were still there some seconds later."""
    left_at_last: list[str]
    """Those that were still there when the run had been resumed."""
    finished_before: Mapping[str, bytes]
    """Manifests of the stages that were finished when the driver was killed."""
    resumed_code: int
    output: str


def status(folder: Path) -> Any:
    args = [sys.executable, "-m", "launcher", "status", "runs/disturbed", "--json"]
    done = subprocess.run(args, cwd=folder, env=ray_runs.environment(), capture_output=True, timeout=60, check=True)
    return json.loads(done.stdout)[0]


def manifests(run: Path) -> dict[str, bytes]:
    stages = run / "stages"
    return {str(path.parent.relative_to(stages)): path.read_bytes() for path in stages.glob("*/*/manifest.json")}


def living(processes: Mapping[int, str], wait_s: float) -> list[str]:
    """Return which processes outlive a wait."""
    with suppress(TimeoutError):
        wait_for(lambda: not any(is_alive(*one) for one in processes.items()), wait_s, "the end of the processes")
    return [who for pid, who in processes.items() if is_alive(pid, who)]


@pytest.fixture(scope="module")
def story(undisturbed: Path) -> Story:
    folder = undisturbed.parents[1]  # with the same model and data
    ray_runs.save_run(folder, "disturbed")
    run = folder / "runs" / "disturbed"

    def is_training(stage: str) -> bool:
        return any(event["event"] == "round" and event["stage"] == f"{stage}/train" for event in events(run))

    first = Command(folder, "train", "disturbed.yaml")
    first.wait_until(lambda: any(run.glob("logs/ray/gang-*")), "the gang starts")
    first.signal(signal.SIGTERM)
    stopped_code = first.end()
    stopped = status(folder)

    second = Command(folder, "resume", "runs/disturbed")
    second.wait_until(lambda: is_training("02-topic"), "task 2 trains")
    family, finished_before = second.family(), manifests(run)
    second.signal(signal.SIGKILL)
    second.end()
    killed = status(folder)
    working = {pid: who for pid, who in family.items() if "Agent" not in who}
    left = living(working, 15.0)

    third = Command(folder, "resume", "runs/disturbed")
    resumed_code = third.end(2 * ray_runs.START_S)
    left_at_last = living(family, 60.0)
    return Story(
        run, stopped_code, stopped, killed, family, left, left_at_last, finished_before, resumed_code, third.output
    )


def test_sigterm_ends_with_75_and_says_stopped(story: Story) -> None:
    assert story.stopped_code == 75
    assert (story.stopped["status"], story.stopped["done"], story.stopped["next"]) == ("stopped", 0, "00-food/train")


def test_a_killed_driver_is_told_from_a_running_one(story: Story) -> None:
    assert (story.killed["status"], story.killed["done"], story.killed["next"]) == ("killed", 4, "02-topic/train")


def test_a_killed_driver_leaves_no_process_of_its_ray_behind(story: Story) -> None:
    assert any("raylet" in who for who in story.family.values())
    assert any("ray::" in who for who in story.family.values())
    assert story.left == []
    assert story.left_at_last == []  # two agents of Ray first try to tell its dead head of their end, for a minute


def test_resume_ends_byte_equal_to_an_undisturbed_run(story: Story, undisturbed: Path) -> None:
    assert story.resumed_code == 0, story.output
    results = ["metrics/R.csv"]
    for stage in sorted(manifests(undisturbed)):
        files = json.loads((undisturbed / "stages" / stage / "manifest.json").read_text(encoding="utf8"))["files"]
        results += [f"stages/{stage}/{name}" for name in files if name != "train.json"]  # that one holds seconds
    assert sum("/train/trainable" in name for name in results) >= 3
    assert sum(name.endswith("scores.json") for name in results) == 3
    different = [name for name in results if (story.run / name).read_bytes() != (undisturbed / name).read_bytes()]
    assert different == []


def test_finished_stages_are_neither_lost_nor_repeated(story: Story) -> None:
    assert sorted(story.finished_before) == ["00-food/evaluate", "00-food/train", "01-film/evaluate", "01-film/train"]
    after = manifests(story.run)
    assert {stage: after[stage] for stage in story.finished_before} == story.finished_before  # `started` is in them
    done = Counter(event["stage"] for event in events(story.run) if event["event"] == "stage_done")
    assert done == dict.fromkeys(after, 1)
    started = Counter(event["stage"] for event in events(story.run) if event["event"] == "stage_start")
    assert started == dict.fromkeys(after, 1) | {"00-food/train": 2, "02-topic/train": 2}


def test_every_attempt_is_written_down(story: Story) -> None:
    state = json.loads((story.run / "run.json").read_text(encoding="utf8"))
    assert state["status"] == "finished"
    assert [attempt["stages_done"] for attempt in state["attempts"]] == [0, 0, 4]
    assert ["ended" in attempt for attempt in state["attempts"]] == [True, False, True]
    assert state["command"].startswith("cl-dist train")


def test_killed_at_three_drawn_points_a_run_ends_byte_equal(undisturbed: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    folder = undisturbed.parents[1]
    ray_runs.save_run(folder, "drawn")
    run, told = folder / "runs" / "drawn", len(events(undisturbed))
    points = sorted(draw.sample(range(2, told), 3))
    sys.stderr.write(f"seed {seed}: killed after {points} of {told} events\n")

    def has_told(count: int) -> bool:
        return len(events(run)) >= count or any(event["event"] == "finished" for event in events(run))

    for number, (before, point) in enumerate(pairwise([0, *points])):
        command = Command(folder, "resume" if number else "train", "runs/drawn" if number else "drawn.yaml")
        command.wait_until(partial(has_told, len(events(run)) + point - before), f"event {point}")
        command.signal(signal.SIGKILL)
        command.end()
    last = Command(folder, "resume", "runs/drawn")
    assert last.end(2 * ray_runs.START_S) == 0, last.output
    assert (run / "metrics/R.csv").read_bytes() == (undisturbed / "metrics/R.csv").read_bytes(), f"seed {seed}"
    for weights in undisturbed.glob("stages/*/train/*.safetensors"):
        assert (run / weights.relative_to(undisturbed)).read_bytes() == weights.read_bytes(), f"seed {seed}: {weights}"
