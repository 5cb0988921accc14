"""What of the Ray dispatcher can be seen without Ray; the rest is in tests/integration."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from cl_dist.dispatch_ray import cluster, mailbox
from cl_dist.dispatch_ray.dispatcher import RayDispatcher
from cl_dist.dispatch_ray.mailbox import Mailbox, Parcel
from cl_dist.errors import ClusterError, DataError
from cl_dist.run_config import ClusterConfig


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "POLL_S", 0.0)


def parcel(number: int) -> Any:
    job: Any = None  # the mailbox does not look inside
    return Parcel(number=number, job=job, out="", logs="", step_timeout_s=0.0)


def test_a_restarted_gang_is_given_the_current_stage_and_none_that_is_done() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        assert await mailbox.fetch(-1) == "wait"
        await mailbox.post(parcel(0))
        assert await mailbox.fetch(-1) == parcel(0)
        assert await mailbox.fetch(-1) == parcel(0)  # asked by a gang that has been started again
        await mailbox.done(0)
        assert await mailbox.fetch(-1) == "wait"
        await mailbox.post(parcel(1))
        assert await mailbox.fetch(0) == parcel(1)
        await mailbox.close()
        assert await mailbox.fetch(0) == "closed"

    asyncio.run(story())


def test_a_stage_that_failed_for_good_is_not_given_to_a_restarted_gang() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.post(parcel(0))
        await mailbox.fail(DataError("first"))
        await mailbox.fail(DataError("second"))
        assert await mailbox.fetch(-1) == "wait"
        assert str((await mailbox.news())["error"]) == "first"

    asyncio.run(story())


@pytest.fixture
def _own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class StoppedError(Exception):
    pass


@pytest.mark.usefixtures("_own_handler")
@pytest.mark.parametrize("during_the_start", [True, False])
def test_sigterm_keeps_the_meaning_it_had_before_ray(monkeypatch: pytest.MonkeyPatch, during_the_start: bool) -> None:
    """ray.init puts a handler of its own there, which exits with 15."""

    def stop(*_: Any) -> None:
        raise StoppedError

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if during_the_start:
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StoppedError):  # noqa: PT012  # from either line, as the parameter says
        cluster.connect(ClusterConfig())
        signal.raise_signal(signal.SIGTERM)


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    with pytest.raises(ClusterError, match=r"cluster.address='127.0.0.1:1': cannot reach it: .*refused"):
        cluster.connect(ClusterConfig(address="127.0.0.1:1"))


@pytest.mark.parametrize(
    ("nodes", "asked", "fits"),
    [
        ([2.0], {"workers": 2}, True),
        ([2.0], {"workers": 3}, False),
        ([2.0, 2.0], {"workers": 3}, True),
        ([2.0, 2.0], {"workers": 1, "cpus_per_worker": 3.0}, False),  # four in all, but none has three
        ([0.6], {"workers": 3, "cpus_per_worker": 0.2}, True),  # 0.6 / 0.2 is a little less than 3
        ([2.0], {"workers": 1, "gpus_per_worker": 1.0}, False),
    ],
)
def test_workers_must_fit_on_the_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: list[float], asked: dict[str, Any], fits: bool
) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    alive = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [gone, *alive])
    if fits:
        cluster.check_fits(ClusterConfig(**asked))
        return
    with pytest.raises(ClusterError, match=r"cluster: \d workers with .* each need .*, the cluster has .* on nodes of"):
        cluster.check_fits(ClusterConfig(**asked))


def test_a_node_must_hold_the_workers_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": gpus}} for gpus in (2.0, 2.0)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    asked: dict[str, Any] = {"workers": 4, "gpus_per_worker": 1.0}
    cluster.check_fits(ClusterConfig(**asked, workers_per_model=2))
    with pytest.raises(ClusterError, match=r"workers_per_model=4: 4 GPU of a node hold one model, the nodes have 2, 2"):
        cluster.check_fits(ClusterConfig(**asked, workers_per_model=4))


def test_a_cluster_that_fails_under_a_run_is_a_cluster_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> None:
        raise RayActorError(error_msg="the mailbox went with the driver's node")

    monkeypatch.setattr(RayDispatcher, "_run", lose)
    with pytest.raises(ClusterError, match=r"RayActorError: the mailbox went .*\nFinished stages are kept: .* resume"):
        object.__new__(RayDispatcher).run(None, "", None)  # type: ignore[arg-type]  # neither is looked at
