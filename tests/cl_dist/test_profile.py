"""The profiler records its window of steps into a trace per rank, and says so when there is nothing to record."""

import gzip
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import ConfigError
from cl_dist.parallel.config import ProfileConfig
from cl_dist.parallel.profile import StepProfiler
from cl_dist.run_config import RunConfig

Event = dict[str, Any]
WINDOW = ProfileConfig(steps=(2, 4))


def run_steps(path: Path, steps: range, config: ProfileConfig | None = WINDOW, fails_at: int = -1) -> list[Event]:
    """Run steps of a matrix product under a profiler and return its events."""
    events: list[Event] = []
    with closing(StepProfiler(config, path, steps, events.append)) as profiler:
        for step in steps:
            with profiler.step(step):
                torch.ones(4, 4) @ torch.ones(4, 4)
                if step == fails_at:
                    raise KeyError(step)
    return events


def recorded(path: Path) -> list[str]:
    """Return the steps in a trace, after checking that it holds operators too."""
    names = [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    steps = [name for name in names if name.startswith("optimizer step ")]
    assert len([name for name in names if name == "aten::matmul"]) == len(steps)
    return steps


def test_the_trace_holds_the_steps_of_the_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cl_dist")
    path = tmp_path / "profile" / "00-x-train-rank0.json.gz"
    assert run_steps(path, range(10)) == [{"event": "profile", "trace": str(path)}]
    assert recorded(path) == ["optimizer step 3", "optimizer step 4"]
    assert f"profile written path={path}" in caplog.text


@pytest.mark.parametrize(
    ("steps", "found", "says"),
    [
        (range(3), ["optimizer step 3"], "only 2 to 3 profiled"),
        (range(3, 9), ["optimizer step 4"], "only 3 to 4 profiled"),
        (range(2), [], "none of them profiled"),
        (range(5, 9), [], "none of them profiled"),
    ],
)
def test_a_window_that_does_not_fit_is_a_warning(tmp_path: Path, steps: range, found: list[str], says: str) -> None:
    path = tmp_path / "trace.json.gz"
    warning, *rest = run_steps(path, steps)
    assert says in warning["warning"]
    assert "cluster.profile.steps=[2, 4]" in warning["warning"]
    assert bool(rest) == path.exists() == bool(found)
    assert not found or recorded(path) == found


def test_a_failure_in_the_window_leaves_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with pytest.raises(KeyError):
        run_steps(path, range(10), fails_at=3)
    assert recorded(path) == ["optimizer step 3", "optimizer step 4"]
    run_steps(path, range(10))  # the profiler is free for another stage


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    assert run_steps(tmp_path / "profile" / "trace.json.gz", range(5)) == []
    assert "profile not written path=" in caplog.text


@pytest.mark.parametrize("steps", [[4, 4], [14, 10], [-1, 3]])
def test_a_window_must_have_steps(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.profile.*expected 0 <= first < last, such as \[10, 14\]"):
        parse(RunConfig, tiny.tree(tmp_path, {"cluster": {"profile": {"steps": steps}}}))


def test_nothing_is_recorded_without_settings(tmp_path: Path) -> None:
    assert run_steps(tmp_path / "trace.json.gz", range(5), None) == []
    assert list(tmp_path.iterdir()) == []


def on_ranks(rank: int, world: int, folder: str) -> list[Event]:
    return run_steps(Path(folder) / f"rank{rank}.json.gz", range(5))


def test_every_rank_writes_a_trace_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(on_ranks, str(tmp_path))
    for rank in (0, 1):
        assert recorded(tmp_path / f"rank{rank}.json.gz") == ["optimizer step 3", "optimizer step 4"]
