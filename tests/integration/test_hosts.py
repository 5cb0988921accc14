"""A run on three hosts, one of which loses its link and another of which is taken away, ends as if nothing had been."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration import ray_runs
from tests.integration.hosts import PORT, Hosts, why_not
from tests.integration.ray_runs import Command, events

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1500)]
CLUSTER = {
    "address": f"{Hosts.address(0)}:{PORT}",
    "checkpoint_steps": 20,
    "max_failures": 10,
    "progress_timeout_s": 15.0,
    "lost_node_timeout_s": 200.0,
}


@pytest.fixture(scope="module")
def hosts(undisturbed: Path) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(f"network namespaces cannot be made: {reason}")
    found = Hosts(undisturbed.parents[1])
    try:
        for number in range(3):
            found.add(number)
        found.start_ray(0)
        found.start_ray(1)
        yield found
    finally:
        found.close()


def save_run(folder: Path, name: str, epochs: int) -> None:
    tree = ray_runs.tree(folder, {"run": {"name": name}, "cluster": CLUSTER})
    tree["science"]["train"]["epochs"] = epochs
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf8")


def test_a_host_that_does_not_see_the_run_folder_is_named_before_any_work(hosts: Hosts, undisturbed: Path) -> None:
    folder = undisturbed.parents[1]
    save_run(folder, "blind", 10)
    hosts.start_ray(2, blind=folder / "runs")
    command = Command(folder, "train", "blind.yaml", env=hosts.env, inside=hosts.inside(0))
    assert command.end(200.0) == 4, command.output
    assert f"({Hosts.address(2)}): does not see the driver's files" in command.output
    assert f"({Hosts.address(1)})" not in command.output
    assert not events(folder / "runs" / "blind")
    hosts.kill(2)


def test_a_cut_link_and_a_lost_host_do_not_change_the_result(hosts: Hosts, undisturbed: Path) -> None:
    folder = undisturbed.parents[1]
    save_run(folder, "hosts", 10)
    run = folder / "runs" / "hosts"
    hosts.start_ray(2)
    command = Command(folder, "train", "hosts.yaml", env=hosts.env, inside=hosts.inside(0))

    def happened(kind: str, times: int, stage: str = "") -> bool:
        return sum(e["event"] == kind and e.get("stage", "").startswith(stage) for e in events(run)) >= times

    command.wait_until(lambda: happened("round", 1), "training")
    hosts.cut(2)
    command.wait_until(lambda: "lost" in _log(run) or "too small" in _log(run), "the loss is noticed")
    hosts.kill(2)  # a node that Ray has given up ends itself, and whoever started it starts it again
    hosts.heal(2)
    hosts.start_ray(2)
    command.wait_until(lambda: happened("gang_restart", 1), "the gang starts again")
    command.wait_until(lambda: happened("round", 1, "01-film"), "the second task trains")
    hosts.remove(1)
    hosts.add(3)
    hosts.start_ray(3)
    assert command.end(2 * ray_runs.START_S) == 0, command.output
    assert happened("gang_restart", 2)
    assert (run / "metrics" / "R.csv").read_bytes() == (undisturbed / "metrics" / "R.csv").read_bytes()


def _log(run: Path) -> str:
    path = run / "logs" / "driver.log"
    return path.read_text(encoding="utf8") if os.path.exists(path) else ""
