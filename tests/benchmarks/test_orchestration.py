"""What a sequence costs beside its stages' own work: Ray, processes, imports, loading, building engines, saving."""

import json
import time
from pathlib import Path
from statistics import median

import pytest
import yaml

from tests.benchmarks.conftest import Measured
from tests.integration import ray_runs
from tests.integration.ray_runs import Command, events

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
TASKS, STAGE_S = 10, 60.0


def test_ten_tasks_of_a_minute_cost_a_tenth_more_and_a_warm_shard_stage_a_second(
    tmp_path: Path, measured: Measured
) -> None:
    tree = ray_runs.tree(tmp_path, {"run": {"name": "cost"}, "science": {"method": {"name": "sequential"}}})
    task = tree["science"]["tasks"][0]
    tree["science"]["tasks"] = [{**task, "id": f"task{number}"} for number in range(TASKS)]
    rounds = {"min_round_steps": 500}  # else there are thousands of rounds, of three tiny steps each
    tree["science"]["train"] |= {"epochs": _epochs(tmp_path, tree), "keep": "last", "lr": 1e-6, **rounds}
    (tmp_path / "cost.yaml").write_text(yaml.safe_dump(tree), encoding="utf8")
    began = time.monotonic()
    command = Command(tmp_path, "train", "cost.yaml")
    assert command.end(1500.0) == 0, command.output
    wall = time.monotonic() - began

    run = tmp_path / "runs" / "cost"
    stages = json.loads((run / "metrics" / "summary.json").read_text(encoding="utf8"))["stages"]
    steps = {event["stage"]: event["total_steps"] for event in events(run) if event["event"] == "round"}
    own = {s["key"]: s["metrics"]["perf/step_s"] * steps[s["key"]] for s in stages if s["kind"] == "train"}
    whole = {event["stage"]: event["seconds"] for event in events(run) if event["event"] == "stage_end"}
    print(f"whole run {wall:.1f} s, steps {sum(own.values()):.1f} s")
    trains = [key for key in whole if key.endswith("/train")]
    print("train, s beside its steps:", " ".join(f"{whole[key] - own[key]:.2f}" for key in trains))
    scored = [whole[key] for key in whole if key.endswith("/evaluate")]
    print("evaluate, s:", " ".join(f"{seconds:.2f}" for seconds in scored))
    stages_s = sum(whole.values())
    print(f"before the first stage, between stages and after the last: {wall - stages_s:.1f} s")
    assert median(own.values()) > STAGE_S / 2
    rest = 100 * (1 - sum(own.values()) / wall)
    what = f"{TASKS} tasks of a minute on two Ray workers, all but training steps"
    assert measured(what, rest, "{:.1f} %", at_most=10)
    assert measured("a shard stage on warm Ray workers, median", median(scored[1:]), "{:.2f} s", at_most=1)


def _epochs(folder: Path, tree: object) -> int:
    """Return how many epochs take a minute: found by a short run of one task."""
    probe = json.loads(json.dumps(tree))
    probe["run"]["name"], probe["science"]["tasks"] = "probe", probe["science"]["tasks"][:1]
    probe["science"]["train"] |= {"epochs": 200, "keep": "last"}
    (folder / "probe.yaml").write_text(yaml.safe_dump(probe), encoding="utf8")
    command = Command(folder, "train", "probe.yaml")
    assert command.end(ray_runs.START_S) == 0, command.output
    found = json.loads((folder / "runs/probe/metrics/summary.json").read_text(encoding="utf8"))
    (stage,) = [stage for stage in found["stages"] if stage["kind"] == "train"]
    (steps,) = {event["total_steps"] for event in events(folder / "runs/probe") if event["event"] == "round"}
    return int(200 * STAGE_S / (stage["metrics"]["perf/step_s"] * steps))
