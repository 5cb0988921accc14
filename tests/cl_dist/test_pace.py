"""Time estimates by hand: none without evidence, then the sum over the stages that are left."""

from typing import Any

import pytest

from cl_dist.pace import EVERY_S, Pace, Planned, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pace(clock: Clock, seconds: dict[str, float] | None = None) -> Pace:
    """Two tasks of a run and of a baseline: 100 and 200 steps, 10 and 20 rows to score."""
    measured = seconds or {}
    plan = [("0/train", "train", 100), ("0/evaluate", "evaluate", 10)]
    plan += [("1/train", "train", 200), ("1/evaluate", "evaluate", 20)]
    return Pace(
        {
            run: [Planned(key, kind, work, measured.get(f"{run}:{key}")) for key, kind, work in plan]
            for run in ("main", "base")
        },
        clock,
    )


def steps(clock: Clock, at: Pace, count: int, each_s: float, total: int = 100, first: int = 1) -> list[dict[str, Any]]:
    """Report optimizer steps; return the progress events."""
    found = []
    for step in range(first, first + count):
        clock.now += each_s
        found.append(at.take("main", {"event": "step", "step": step, "total_steps": total}))
    return [event for event in found if event is not None]


def test_nothing_is_estimated_without_evidence() -> None:
    clock = Clock()
    at = pace(clock)
    assert at.estimates() == {}
    at.take("main", {"event": "stage_start", "stage": "0/train"})
    assert at.estimates() == {}
    steps(clock, at, 3, 1.0)  # two seconds and two steps between the first and the last
    assert at.estimates() == {}
    steps(clock, at, 1, 1.0, first=4)
    assert at.estimates() == {"steps_per_s": 1.0, "stage_left_s": 96}  # nothing has been scored: no total


def test_the_total_is_the_sum_over_the_stages_that_are_left() -> None:
    clock = Clock()
    at = pace(clock)
    at.take("main", {"event": "stage_start", "stage": "0/train"})
    steps(clock, at, 100, 2.0)
    at.take("main", {"event": "stage_end", "stage": "0/train", "seconds": 260.0})  # 60 s to start the workers
    at.take("main", {"event": "stage_done", "stage": "0/train", "metrics": {"perf/stage_s": 200.0}})
    assert "left_s" not in at.estimates()
    at.take("main", {"event": "stage_start", "stage": "0/evaluate"})
    at.take("main", {"event": "stage_end", "stage": "0/evaluate", "seconds": 5.0})
    # 2 s a step, half a second a row: 200 steps and 20 rows of the run, 300 and 30 of the baseline
    assert at.estimates()["left_s"] == 2 * (200 + 300) + (20 + 30) / 2
    at.take("main", {"event": "stage_start", "stage": "1/train"})
    clock.now += 10.0
    assert at.estimates()["left_s"] == 2 * (200 + 300) + (20 + 30) / 2 - 10
    steps(clock, at, 50, 1.0, total=200)  # twice as fast as the stage before
    assert at.estimates() == {"steps_per_s": 1.0, "stage_left_s": 150, "left_s": 150 + 2 * 300 + 25}


def test_a_resumed_run_knows_its_pace_and_a_baseline_has_its_own() -> None:
    seconds = {"main:0/train": 200.0, "main:0/evaluate": 5.0, "main:1/train": 400.0, "main:1/evaluate": 10.0}
    at = pace(Clock(), seconds | {"base:0/train": 50.0})
    assert at.estimates() == {"left_s": 5 + 100 + 10}  # half a second a step, not two


def test_a_progress_event_comes_every_30_seconds_with_the_last_loss() -> None:
    clock = Clock()
    at = pace(clock)
    at.take("main", {"event": "stage_start", "stage": "0/train"})
    at.take("main", {"event": "telemetry", "step": 1, "total_steps": 100, "train/loss": 0.5})
    found = steps(clock, at, 70, 1.0)
    assert [event["step"] for event in found] == [31, 61]
    assert found[1] == {
        "event": "progress", "step": 61, "total_steps": 100, "loss": 0.5, "steps_per_s": 1.0, "stage_left_s": 39,
    }  # fmt: skip
    assert EVERY_S == 30.0


def test_speed_is_that_of_the_last_minute_and_begins_anew_where_steps_are_repeated() -> None:
    clock = Clock()
    at = pace(clock)
    at.take("main", {"event": "stage_start", "stage": "0/train"})
    steps(clock, at, 10, 20.0)
    steps(clock, at, 61, 1.0, first=11)
    assert at.estimates()["steps_per_s"] == 1.0
    at.take("main", {"event": "continued", "step": 40, "total_steps": 100})  # a gang that restarted
    assert "steps_per_s" not in at.estimates()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "5 s"),
        (31, "35 s"),
        (54, "55 s"),
        (60, "1 min"),
        (61, "2 min"),
        (3500, "59 min"),
        (3599, "1 h 00 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_an_estimate_is_printed_as_coarse_as_it_is(seconds: float, text: str) -> None:
    assert duration(seconds) == text
