"""A hundred tiny tasks in one run: memory and open files must not grow, and time per task hardly."""

import gc
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.run_events import Tracker
from cl_dist.sequence import run_stages
from tests.benchmarks.conftest import Measured

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
TASKS = 100


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.mark.parametrize("method", [{"name": "individual"}, {"name": "adapter", "size": 8}])
def test_a_hundred_tasks_cost_hardly_more_each_than_ten(
    tmp_path: Path, method: dict[str, Any], measured: Measured
) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": method}}, tasks=("food",))
    (task,) = tree["science"]["tasks"]
    tree["science"]["tasks"] = [{**task, "id": f"task{number}"} for number in range(TASKS)]
    series: list[tuple[float, float, int]] = []
    gc.collect()
    gc.freeze()  # as in a process of its own: what other benchmarks have left is not looked through again and again
    began = time.monotonic()

    def watch(event: Mapping[str, Any]) -> None:
        nonlocal began
        if event["event"] == "stage_done" and event["stage"].endswith("/train"):
            now = time.monotonic()
            series.append((now - began, _memory_mb(), len(os.listdir("/proc/self/fd"))))
            began = now

    from cl_dist.config import parse
    from cl_dist.run import Run
    from cl_dist.run_config import RunConfig

    run = Run(parse(RunConfig, tree))
    run_stages(run, LocalDispatcher(), Tracker(run, watch=watch))
    assert len(series) == TASKS
    for number in (0, 9, 19, 39, 59, 79, 99):
        seconds, memory, files = series[number]
        print(f"{method['name']}: task {number + 1}: {seconds:.2f} s, {memory:.0f} MB, {files} open files")
    early, late = series[10:20], series[-10:]
    of = f"tasks 91 to 100 of `{method['name']}`, against tasks 11 to 20"
    assert measured(f"open files: {of}", late[-1][2] - early[-1][2], "{:+d}", at_most=2)
    memory = mean(m for _, m, _ in late) - mean(m for _, m, _ in early)
    assert measured(f"memory: {of}", memory, "{:+.0f} MB", at_most=100)
    if method["name"] == "individual":  # the others score all seen tasks after each
        # Summaries go over all stages: some milliseconds of a task's time for each task before it.
        slope = (mean(s for s, _, _ in late) - mean(s for s, _, _ in early)) / 80
        assert measured(f"time: {of}", 1000 * slope, "{:+.1f} ms per earlier task", at_most=2)
