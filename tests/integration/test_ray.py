"""Gang and pool on a Ray cluster that all tests share: what dies is done again, to equal bytes; errors arrive as ours.

Stages are compared with those of the run that the command line computed undisturbed: the fingerprints are the same.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cl_dist.config import merged, parse
from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.dispatch_ray.cluster import connect
from cl_dist.dispatch_ray.dispatcher import RayDispatcher
from cl_dist.dispatch_ray.gang import Gang
from cl_dist.dispatch_ray.nodes import alive, check_storage, probe
from cl_dist.errors import ClDistError, ClusterError, DataError, TrainingError
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import Tracker
from cl_dist.sequence import run_stages
from cl_dist.stage import StageRef, ref
from tests.integration import ray_runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
Event = Mapping[str, Any]


@pytest.fixture(scope="module")
def cluster(undisturbed: Path) -> Iterator[Cluster]:
    """A Ray cluster with two CPUs, started where pytest was: not where the runs below are."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray takes a loopback address to join for the machine's public one; this keeps the cluster off the network.
        patch.setattr("ray._private.services.get_node_ip_address", lambda address=None: "127.0.0.1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "node_ip_address": "127.0.0.1"})
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def address(cluster: Cluster) -> str:
    return str(cluster.address)


@pytest.fixture(scope="module")
def folder(undisturbed: Path) -> Iterator[Path]:
    """The working directory of these tests: that of the undisturbed run, with its model and data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(undisturbed.parents[1])
        patch.setenv("PYTHONPATH", ray_runs.environment()["PYTHONPATH"])
        yield undisturbed.parents[1]


def make_run(folder: Path, name: str, cluster: Mapping[str, Any]) -> Run:
    return Run(parse(RunConfig, ray_runs.tree(folder, {"run": {"name": name}, "cluster": cluster})))


def compute(run: Run, watch: Callable[[RayDispatcher, Event], None] = lambda ray, event: None) -> None:
    """Compute what is missing of a run on Ray; watch sees every event, with the dispatcher."""
    dispatcher = RayDispatcher(run.config.cluster, run.config.folder)
    try:
        run_stages(run, dispatcher, Tracker(run, watch=lambda event: watch(dispatcher, event)))
    finally:
        dispatcher.close()


def gang_pids(dispatcher: RayDispatcher) -> list[int]:
    assert dispatcher._gang is not None
    return [place.pid for place in dispatcher._gang.slots()]


# --------------------------------------------------------------------------------------------------------------- gang


@dataclass(frozen=True)
class GangStory:
    """A run with max_failures=1 whose gang loses a rank in its first task, and another one in its third."""

    run: Path
    pids: Mapping[str, list[int]]
    """The gang after each stage, and when a rank was killed."""
    error: ClDistError


@pytest.fixture(scope="module")
def gang(address: str, folder: Path) -> GangStory:
    run = make_run(folder, "gang", {"address": address, "max_failures": 1})
    pids: dict[str, list[int]] = {}

    def watch(dispatcher: RayDispatcher, event: Event) -> None:
        if event["event"] == "round" and event["task"] in (0, 2) and f"killed {event['task']}" not in pids:
            pids[f"killed {event['task']}"] = gang_pids(dispatcher)
            os.kill(gang_pids(dispatcher)[1], signal.SIGKILL)
        if event["event"] == "stage_end":
            pids[event["stage"]] = gang_pids(dispatcher)

    with pytest.raises(TrainingError) as caught:
        compute(run, watch)
    return GangStory(run.config.folder, pids, caught.value)


def test_a_stage_whose_rank_was_killed_is_trained_again_to_equal_bytes(gang: GangStory, undisturbed: Path) -> None:
    assert gang.pids["00-food/train"][1] != gang.pids["killed 0"][1]
    restarts = [event for event in ray_runs.events(gang.run) if event["event"] == "gang_restart"]
    assert [(event["stage"], event["starts"]) for event in restarts] == [("00-food/train", 2)]
    for stage in ("00-food/train", "01-film/train"):
        found, expected = (
            {path.name: path.read_bytes() for path in (run / "stages" / stage).glob("*.safetensors")}
            for run in (gang.run, undisturbed)
        )
        assert "learner.safetensors" in expected
        assert found == expected


def test_one_gang_serves_consecutive_train_stages(gang: GangStory) -> None:
    assert len(set(gang.pids["00-food/train"])) == 2
    assert gang.pids["00-food/train"] == gang.pids["01-film/train"] == gang.pids["killed 2"]


def test_more_failures_than_allowed_end_the_run_with_their_cause(gang: GangStory) -> None:
    assert gang.error.exit_code == 5
    assert "cluster.max_failures=1" in str(gang.error)
    assert "worker died" in str(gang.error) or "actor died" in str(gang.error)
    assert "`cl-dist resume` continues from there" in str(gang.error)
    finished = {path.parent.parent.name for path in gang.run.glob("stages/*/evaluate/manifest.json")}
    assert finished == {"00-food", "01-film"}


def test_an_error_that_no_restart_would_cure_arrives_as_it_was_raised(address: str, tmp_path: Path) -> None:
    settings = {"dispatcher": "ray", "engine": "deepspeed", "address": address}
    run = tiny.make_run(tmp_path, {"cluster": settings}, tasks=("food",))
    header = run.publish(0) / "task.json"
    header.write_text(header.read_text().replace(run.data(0).digests["train"], 64 * "0"))  # not what the driver read
    seen: list[str] = []
    with pytest.raises(DataError, match=r"^task food: .* contains other rows than the driver published") as caught:
        compute(run, lambda _, event: seen.append(event["event"]))
    assert type(caught.value) is DataError  # not Ray's wrapping of it
    assert [kind for kind in seen if kind != "phase"] == ["begin", "stage_start"]


class Late:
    """Takes a CPU of the cluster after a while, as the controller of a gang does that starts again."""

    def take(self, after_s: float) -> None:
        time.sleep(after_s)
        ray.util.placement_group([{"CPU": 1}])


def test_a_gang_given_up_in_a_stage_takes_nothing_of_the_cluster_with_it(address: str, tmp_path: Path) -> None:
    config = tiny.make_run(tmp_path, {"cluster": {"dispatcher": "ray", "address": address, "workers": 1}}).config
    connect(config.cluster)
    try:
        gang = Gang(config.cluster, config.folder)
        job = ray.get_runtime_context().get_job_id()
        while not any(name.endswith(job) for name in groups()):
            time.sleep(0.1)
        gang._busy = True
        late: Any = ray.remote(Late).options(num_cpus=0).remote()
        ray.get(late.__ray_ready__.remote(), timeout=120)
        late.take.remote(1.0)
        gang.close()
        states = [group["state"] for name, group in groups().items() if name.endswith(job)]
        assert len(states) > 1
        assert set(states) == {"REMOVED"}
    finally:
        ray.shutdown()


def groups() -> Mapping[str, Any]:
    """Return all placement groups that the cluster has seen."""
    found: Mapping[str, Any] = ray.util.placement_group_table()
    return found


# --------------------------------------------------------------------------------------------------------------- pool


@dataclass(frozen=True)
class PoolStory:
    """A run whose last Evaluate stage was missing, and whose pool lost all its actors at the first shard."""

    run: Path
    events: list[Event]
    gangs: list[bool]
    """At each event, whether there was a gang."""


@pytest.fixture(scope="module")
def pool(address: str, folder: Path, undisturbed: Path) -> PoolStory:
    run = make_run(folder, "pool", {"address": address})
    copytree(undisturbed / "stages", run.config.folder / "stages")
    rmtree(run.config.folder / "stages/02-topic/evaluate")
    seen: list[Event] = []
    gangs: list[bool] = []

    def watch(dispatcher: RayDispatcher, event: Event) -> None:
        seen.append(event)
        gangs.append(dispatcher._gang is not None)
        if (event["event"], event.get("step")) == ("step", 1):
            assert dispatcher._pool is not None
            pids = [actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in dispatcher._pool._actors]
            for pid in ray.get(pids, timeout=60):
                os.kill(pid, signal.SIGKILL)

    compute(run, watch)
    return PoolStory(run.config.folder, seen, gangs)


def test_shards_of_dead_actors_are_scored_again_and_counted_once(pool: PoolStory) -> None:
    retries = [event for event in pool.events if event["event"] == "shard_retry"]
    assert retries
    assert all(event["attempt"] == 2 for event in retries)
    steps = [(event["step"], event["total_steps"]) for event in pool.events if event["event"] == "step"]
    # three tasks and three ablations of the last one, 10 rows in shards of 6 each
    assert steps == [(number, 12) for number in range(1, 13)]


def test_scores_are_those_of_an_undisturbed_pool_and_of_one_worker(
    pool: PoolStory, undisturbed: Path, folder: Path
) -> None:
    alone = make_run(folder, "alone", {"dispatcher": "local", "engine": "torch", "workers": 1})
    copytree(undisturbed / "stages", alone.config.folder / "stages")
    rmtree(alone.config.folder / "stages/02-topic/evaluate")
    run_stages(alone, LocalDispatcher(), Tracker(alone))
    for name in ("scores.json", *(f"predictions/{task}.jsonl" for task in tiny.TASKS)):
        scored = (pool.run / "stages/02-topic/evaluate" / name).read_bytes()
        assert scored == (undisturbed / "stages/02-topic/evaluate" / name).read_bytes()
        assert scored == (alone.config.folder / "stages/02-topic/evaluate" / name).read_bytes()


def test_a_run_that_only_has_an_evaluate_stage_left_starts_no_gang(pool: PoolStory) -> None:
    assert not any(pool.gangs)
    assert [event["stage"] for event in pool.events if event["event"] == "stage_start"] == ["02-topic/evaluate"]
    assert not (pool.run / "logs" / "ray").exists()


@pytest.fixture
def only_scores(address: str, folder: Path, undisturbed: Path, request: pytest.FixtureRequest) -> Run:
    """A run that only has an Evaluate stage left, with other settings of the cluster."""
    number = sum(1 for _ in (folder / "runs").glob("scores-*"))
    run = make_run(folder, f"scores-{number}", {"address": address, **request.param})
    copytree(undisturbed / "stages", run.config.folder / "stages")
    rmtree(run.config.folder / "stages/02-topic/evaluate")
    return run


@pytest.mark.parametrize("only_scores", [{"workers": 3, "min_workers": 1}], indirect=True)
def test_a_pool_works_with_the_actors_that_the_cluster_can_hold(only_scores: Run, undisturbed: Path) -> None:
    compute(only_scores)
    scores = "stages/02-topic/evaluate/scores.json"
    assert (only_scores.config.folder / scores).read_bytes() == (undisturbed / scores).read_bytes()


@pytest.mark.parametrize("only_scores", [{"start_timeout_s": 3.0}], indirect=True)
def test_a_pool_that_others_leave_no_room_says_so(only_scores: Run) -> None:
    def watch(dispatcher: RayDispatcher, event: Event) -> None:
        if event["event"] == "stage_start":
            ray.get(ray.util.placement_group([{"CPU": 2}]).ready(), timeout=60)

    with pytest.raises(ClusterError, match=r"02-topic/evaluate: none of 2 actors started .* free now: 0 CPU, 0 GPU"):
        compute(only_scores, watch)


# ----------------------------------------------------------------------------------------------------- pseudo-samples


def test_samples_of_a_zero3_model_are_the_same_whoever_dies_and_on_one_worker(address: str, tmp_path: Path) -> None:
    """A LAMOL run under ZeRO-3 whose actors are all killed while they write, then written again in this process."""
    science = {"method": dict(tiny.METHODS["lamol"]), "train": dict(tiny.TEXT_TRAIN), "generate": {"shard_samples": 2}}
    over = {"run": {"name": "lamol"}, "science": science, "cluster": {"address": address, "zero_stage": 3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("PYTHONPATH", ray_runs.environment()["PYTHONPATH"])
        made = Run(parse(RunConfig, tiny.tree(tmp_path, merged(ray_runs.SETTINGS, over), tasks=("food", "film"))))
        killed: list[int] = []

        def watch(dispatcher: RayDispatcher, event: Event) -> None:
            if event.get("stage") == "01-film/generate" and event["event"] == "step" and not killed:
                assert dispatcher._pool is not None
                pids = [actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in dispatcher._pool._actors]
                killed.extend(ray.get(pids, timeout=60))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        compute(made, watch)
        stage = made.stage(StageRef(task=1, stage="generate"))
        again = tmp_path / "again"
        again.mkdir()
        LocalDispatcher().run(made.job(stage), str(again), Tracker(made))
        stored = made.ledger.path(ref(stage))
        assert len(killed) == 2
        assert any(event["event"] == "shard_retry" for event in ray_runs.events(made.config.folder))
        for name in ("samples.jsonl", "replay.json"):
            assert (stored / name).read_bytes() == (again / name).read_bytes()
        assert len((stored / "samples.jsonl").read_text().splitlines()) >= 3


# ------------------------------------------------------------------------------------------------------------ cluster


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers": 3}, "3 workers with 1 CPU each need 3, the cluster has 2 in total"),
        ({"workers": 1, "cpus_per_worker": 2.5}, "1 workers with 2.5 CPU each need 2.5, the cluster has 2 in total"),
        ({"gpus_per_worker": 0.5}, "2 workers with 0.5 GPU each need 1, the cluster has 0 in total"),
    ],
)
def test_a_request_that_can_never_fit_fails_at_once(
    address: str, folder: Path, asked: Mapping[str, Any], message: str
) -> None:
    run = make_run(folder, "large", {"address": address, **asked})
    with pytest.raises(ClusterError, match=message):
        RayDispatcher(run.config.cluster, run.config.folder)
    assert not ray.is_initialized()


def test_a_node_that_has_just_died_is_left_out_and_not_called_blind(cluster: Cluster, folder: Path) -> None:
    node = cluster.add_node(num_cpus=0, node_ip_address="127.0.0.1")
    run = make_run(folder, "left", {"address": str(cluster.address)})
    connect(run.config.cluster)
    try:
        known = alive()
        cluster.remove_node(node, allow_graceful=False)
        assert len(known) == len(alive()) == 2  # Ray has not missed it yet
        (left,) = probe(folder, known)
        assert (left.reads, left.writes, left.error) == (True, True, "")
        check_storage(folder)
    finally:
        ray.shutdown()
