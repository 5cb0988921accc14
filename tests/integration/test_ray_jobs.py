"""A run as a job of a cluster that was started by hand, with a token: submitted, watched, stopped, resumed by its id.

Then a driver that joins this cluster loses its head.
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import ray_runs
from tests.integration.ray_nodes import Nodes
from tests.integration.ray_runs import Command, events, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1200)]


@dataclass
class Place:
    """Where a user sits: a folder with run files and data, and a cluster."""

    folder: Path
    nodes: Nodes

    def ask(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher", *args]
        env = {**self.nodes.env, "RAY_ADDRESS": self.nodes.url}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def run_file(self, name: str, runs: Path | str, **cluster: Any) -> Path:
        """Write a run file that names its data by relative paths, as a user has them."""
        tree = ray_runs.tree(self.folder, {"run": {"name": name, "dir": str(runs)}, "cluster": cluster})
        for task in tree["science"]["tasks"]:
            task["source"]["path"] = Path(task["source"]["path"]).name
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf8")
        return path


@pytest.fixture(scope="module")
def place(undisturbed: Path) -> Iterator[Place]:
    folder = undisturbed.parents[1]  # with the same model and data
    nodes = Nodes(folder)
    try:
        nodes.add()
        yield Place(folder, nodes)
    finally:
        nodes.close()


def dashboard(place: Place, path: str) -> Any:
    request = urllib.request.Request(f"{place.nodes.url}{path}", headers=place.nodes.headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_job_is_submitted_watched_stopped_and_resumed(place: Place, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    run = shared / "job"
    long = "science.train.epochs=60"  # so that it is at work when it is told to stop
    place.run_file("job", shared, cpus_per_worker=0.5)
    plain = place.run_file("plain", tmp_path, address=place.nodes.address, cpus_per_worker=0.5)
    place.ask("train", str(plain), long)

    submitted = place.ask("job", "submit", "job.yaml", long, "cluster.checkpoint_minutes=0")
    job = submitted.stdout.strip()
    assert job.startswith("job-")
    assert "\n" not in job
    again = place.ask("job", "submit", "job.yaml", long, "cluster.checkpoint_minutes=0")
    assert again.stdout == submitted.stdout
    assert "exists already" in again.stderr
    wait_for(lambda: any(event["event"] == "stage_start" for event in events(run)), ray_runs.START_S, "a stage")

    (listed,) = json.loads(place.ask("job", "list", "--json").stdout)
    assert (listed["id"], listed["status"], listed["folder"]) == (job, "RUNNING", str(run))
    names = {task["name"] for task in dashboard(place, "/api/v0/tasks?limit=1000")["data"]["result"]["result"]}
    assert "00-food/train" in names
    assert not [name for name in names if name.startswith("Mailbox.") and "working" not in name and "init" not in name]
    told = place.ask("job", "status", job, "--address", place.nodes.url)
    assert "RUNNING" in told.stdout
    assert "stage_start stage=00-food/train" in place.ask("job", "logs", job).stdout
    assert place.ask("job", "resume", job, "--address", place.nodes.url, code=2).stderr.count("RUNNING") == 1

    wait_for(lambda: any(event["event"] == "round" for event in events(run)), ray_runs.START_S, "a round")
    stopped = place.ask("job", "stop", job)
    assert "STOPPED" in stopped.stdout
    assert "StoppedError" in stopped.stdout  # as at exit 75
    assert any(event["event"] == "saved" for event in events(run)), place.ask("job", "logs", job).stdout
    assert "continues it" in place.ask("job", "submit", "job.yaml", long, "cluster.checkpoint_minutes=0", code=2).stderr

    for name in ("food", "film", "topic"):  # the run folder has them
        (place.folder / f"{name}.jsonl").rename(place.folder / f"{name}.away")
    try:
        resumed = place.ask("job", "resume", job, "--address", place.nodes.url)
        followed = place.ask("job", "logs", "-f", job)
    finally:
        for name in ("food", "film", "topic"):
            (place.folder / f"{name}.away").rename(place.folder / f"{name}.jsonl")
    assert resumed.stdout.strip() == job
    assert "continued stage=" in followed.stderr + followed.stdout
    assert (run / "metrics/R.csv").read_bytes() == (tmp_path / "plain/metrics/R.csv").read_bytes()
    assert "SUCCEEDED" in place.ask("job", "status", job, "--address", place.nodes.url).stdout


def test_a_cluster_is_checked_before_a_run(place: Place) -> None:
    place.run_file("checked", "runs", address=place.nodes.address, cpus_per_worker=0.5)
    document = json.loads(place.ask("check", "checked.yaml", "--json").stdout)
    found = {(finding["check"], finding["state"]) for finding in document["findings"]}
    assert {("cluster", "ok"), ("resources", "ok"), ("versions", "ok"), ("storage", "ok"), ("disk", "ok")} <= found
    nodes = [finding for finding in document["findings"] if finding["check"] == "versions"]
    assert len(nodes) == 2
    assert not list((place.folder / "runs").glob("*/.probe-*"))
    asked = place.ask("check", "checked.yaml", "cluster.workers=64", "--json", code=4)
    (fault,) = [finding for finding in json.loads(asked.stdout)["findings"] if finding["state"] == "fail"]
    assert fault["check"] == "resources"
    assert "add nodes" in fault["remedy"]


def test_a_stranger_without_the_token_is_told_so(place: Place) -> None:
    command = [sys.executable, "-m", "launcher", "job", "list", "--address", place.nodes.url]
    env = {**place.nodes.env, "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(command, cwd=place.folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 7
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_relative_run_folder_and_unknown_jobs_are_refused(place: Place) -> None:
    place.run_file("relative", "runs")
    assert "run.dir=/shared/runs" in place.ask("job", "submit", "relative.yaml", code=2).stderr
    assert "no job 'nobody'" in place.ask("job", "logs", "nobody", code=7).stderr


def test_a_run_that_loses_the_head_ends_and_is_resumed_on_the_next(place: Place, undisturbed: Path) -> None:
    path = place.run_file("headless", "runs", address=place.nodes.address, cpus_per_worker=0.5, checkpoint_steps=5)
    run = place.folder / "runs" / "headless"
    first = Command(place.folder, "train", path.name, env=place.nodes.env)
    first.wait_until(lambda: any(event["event"] == "round" for event in events(run)), "a round")
    place.nodes.kill(0)
    assert first.end(200.0) == 4, first.output
    assert "cl-dist resume" in first.output
    place.nodes.start_head()
    place.nodes.add()
    second = Command(place.folder, "resume", "runs/headless", env=place.nodes.env)
    assert second.end(ray_runs.START_S) == 0, second.output
    assert (run / "metrics" / "R.csv").read_bytes() == (undisturbed / "metrics" / "R.csv").read_bytes()
