"""A Ray run stopped in a task and resumed elsewhere, a rank that dies after a checkpoint, a node that goes."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster

from cl_dist.config import merged, parse
from cl_dist.contract import tiny
from cl_dist.dispatch_ray.dispatcher import RayDispatcher
from cl_dist.errors import ClusterError
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import Tracker
from cl_dist.sequence import run_stages
from cl_dist.stage import StageRef
from cl_dist.stages.weights import ShardedWeights
from tests.integration import ray_runs
from tests.integration.ray_runs import Command, events
from tests.parity import train_here

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
LONG = {"epochs": 60, "lr": 1e-4, "keep": "last"}
"""180 steps, some seconds: a task with a middle."""
PREEMPTION = 2
"""The reason that a node is drained for, in Ray's protocol."""
TRAIN = StageRef(task=0, stage="train")
ALONE: Mapping[str, Any] = {"dispatcher": "local", "engine": "torch", "workers": 1}


def settings(folder: Path, name: str, cluster: Mapping[str, Any], train: Mapping[str, Any]) -> Any:
    over = {
        "run": {"name": name},
        "cluster": dict(cluster),
        "science": {"train": dict(train), "method": {"name": "sequential"}},
    }
    return tiny.tree(folder, merged(ray_runs.SETTINGS, over), tasks=("food",))


def test_stopped_in_a_task_a_run_goes_on_with_another_gang_and_zero_stage(tmp_path: Path) -> None:
    tree = settings(tmp_path, "stopped", {}, LONG)
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(tree))
    folder = tmp_path / "runs" / "stopped"

    first = Command(tmp_path, "train", "stopped.yaml")
    first.wait_until(lambda: any(event["event"] == "round" for event in events(folder)), "rounds are trained")
    first.signal(signal.SIGTERM)
    assert first.end() == 75, first.output
    assert any(event["event"] == "saved" for event in events(folder)), first.output
    (index,) = folder.rglob("checkpoint.json")
    step = json.loads(index.read_text())["step"]
    assert 0 < step < 60 * 3

    second = Command(tmp_path, "resume", "runs/stopped", "cluster.workers=1", "cluster.zero_stage=3")
    assert second.end(2 * ray_runs.START_S) == 0, second.output
    (continued,) = [event for event in events(folder) if event["event"] == "continued"]
    assert continued["step"] == step

    alone = Run(parse(RunConfig, merged(tree, {"cluster": ALONE})))
    whole = train_here(alone.job(alone.plan(0)[0]), tmp_path / "alone").weights
    found = dict(ShardedWeights(folder / "stages/00-food/train"))
    torch.testing.assert_close(found, whole, rtol=0.0, atol=1e-5)
    assert not list(folder.rglob("checkpoints"))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.services.get_node_ip_address", lambda address=None: "127.0.0.1")
        patch.setenv("PYTHONPATH", ray_runs.environment()["PYTHONPATH"])
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1"})
        yield found
        found.shutdown()


@pytest.mark.long
def test_a_gang_outlives_a_rank_and_a_lost_node_is_told(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cl_dist.dispatch_ray.cluster.CAPACITY_CHECK_S", 1.0)
    asked = {"address": cluster.address, "checkpoint_steps": 20, "lost_node_timeout_s": 5.0, "max_failures": 5}
    asked["checkpoint_async"] = False  # the rank is killed some steps after the first
    run = Run(parse(RunConfig, settings(tmp_path, "nodes", asked, LONG)))
    seen: list[dict[str, Any]] = []

    dispatcher = RayDispatcher(run.config.cluster, run.config.folder)

    def watch(event: Mapping[str, Any]) -> None:
        seen.append(dict(event))
        kinds = [one["event"] for one in seen]
        if event["event"] == "round" and kinds.count("round") == 9 and dispatcher._gang is not None:
            os.kill(dispatcher._gang.slots()[1].pid, signal.SIGKILL)
        if event["event"] == "round" and "continued" in kinds and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    try:
        with pytest.raises(ClusterError, match=r"(?s)lost nodes.*lost_node_timeout_s=5.*the last checkpoint") as caught:
            run_stages(run, dispatcher, Tracker(run, watch=watch))
    finally:
        dispatcher.close()
    assert caught.value.exit_code == 4
    continued = [event["step"] for event in seen if event["event"] == "continued"]
    assert len(continued) == 1  # after the rank was killed
    assert continued[0] % 20 == 0
    assert continued[0] > 0


@pytest.mark.long
def test_an_elastic_gang_shrinks_and_grows(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, then one, then two, in the middle of one task."""
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    asked = {"address": cluster.address, "checkpoint_steps": 10, "min_workers": 1, "elastic_interval_s": 1.0}
    asked["checkpoint_async"] = False
    train = {**LONG, "epochs": 700, "lr": 2e-5}
    run = Run(parse(RunConfig, settings(tmp_path, "elastic", {**asked, "max_failures": 5}, train)))
    dispatcher = RayDispatcher(run.config.cluster, run.config.folder)
    sizes: list[int] = []
    continued: list[int] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "continued":
            continued.append(event["step"])
        if event["event"] != "round" or dispatcher._gang is None:
            return
        sizes.append(len(dispatcher._gang.slots()))
        if sizes.count(2) == 5 and len(nodes) == 2 and 1 not in sizes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if sizes[-1] == 1 and sizes.count(1) == 3:
            nodes.append(cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1"))

    try:
        run_stages(run, dispatcher, Tracker(run, watch=watch))
    finally:
        dispatcher.close()
    changes = [size for number, size in enumerate(sizes) if number == 0 or sizes[number - 1] != size]
    assert changes == [2, 1, 2]
    assert len(continued) == 2
    assert continued == sorted(continued)
    alone = Run(parse(RunConfig, settings(tmp_path, "alone", ALONE, train)))
    whole = train_here(alone.job(alone.plan(0)[0]), tmp_path / "alone").weights
    torch.testing.assert_close(dict(ShardedWeights(run.ledger.path(TRAIN))), whole, rtol=0.0, atol=1e-5)


@pytest.mark.long
def test_notice_of_a_drained_node_saves_the_stage(cluster: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing else would save it: the next node goes on where the notice came."""
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cl_dist.dispatch_ray.cluster.CAPACITY_CHECK_S", 1.0)
    asked = {"address": cluster.address, "checkpoint_minutes": 0, "max_failures": 5}
    train = {**LONG, "epochs": 300, "lr": 5e-5}
    run = Run(parse(RunConfig, settings(tmp_path, "drained", asked, train)))
    dispatcher = RayDispatcher(run.config.cluster, run.config.folder)
    seen: list[dict[str, Any]] = []

    def watch(event: Mapping[str, Any]) -> None:
        seen.append(dict(event))
        kinds = [one["event"] for one in seen]
        if kinds.count("round") == 5 and event["event"] == "round":
            worker: Any = global_worker
            accepted, why = worker.gcs_client.drain_node(nodes[1].node_id, PREEMPTION, "planted", 0)
            assert accepted, why
        if len(nodes) == 2 and list(run.config.folder.rglob("step-*[0-9]/checkpoint.json")):
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    try:
        run_stages(run, dispatcher, Tracker(run, watch=watch))
    finally:
        dispatcher.close()
    (notice,) = [event for event in seen if event["event"] == "notice"]
    assert notice["ranks"] in ([0], [1])
    continued = [event["step"] for event in seen if event["event"] == "continued"]
    assert continued
    assert continued[0] > 15
    alone = Run(parse(RunConfig, settings(tmp_path, "alone", ALONE, train)))
    whole = train_here(alone.job(alone.plan(0)[0]), tmp_path / "alone").weights
    torch.testing.assert_close(dict(ShardedWeights(run.ledger.path(TRAIN))), whole, rtol=0.0, atol=1e-5)
