"""What of the Ray dispatcher can be seen without Ray; the rest is in tests/integration."""

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import ray
from ray._raylet import (  # type: ignore[attr-defined]  # compiled
    AuthenticationMode,
    AuthenticationTokenLoader,
    get_authentication_mode,
)
from ray.exceptions import RayActorError

from cl_dist.dispatch_ray import cluster, mailbox
from cl_dist.dispatch_ray.dispatcher import RayDispatcher
from cl_dist.dispatch_ray.mailbox import Mailbox, StageTicket
from cl_dist.dispatch_ray.private_ray import loopback, private
from cl_dist.errors import ClusterError, DataError, JobError
from cl_dist.run_config import ClusterConfig
from launcher.cluster.jobs import Jobs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "POLL_S", 0.0)


def parcel(number: int) -> Any:
    job: Any = None  # the mailbox does not look inside
    return StageTicket(number=number, job=job, out="", logs="", progress_timeout_s=0.0)


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


def test_ranks_are_handed_the_drivers_secrets_and_jobs_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/models")
    asked: list[Any] = []

    def init(**settings: Any) -> SimpleNamespace:
        asked.append(settings)
        return SimpleNamespace(dashboard_url=None)

    monkeypatch.setattr(ray, "init", init)
    with cluster.connect(ClusterConfig()):
        assert asked[0]["runtime_env"]["env_vars"]["HF_HOME"] == "/models"
        assert "hf_secret" not in str(asked)
        place = cluster.WorkerSlot(rank=0, node="a", gpus="", pid=1)
        assert asyncio.run(Mailbox(cluster.secrets()).hello(place, 1)) == {"HF_TOKEN": "hf_secret"}


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

    def init(**_: Any) -> SimpleNamespace:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if during_the_start:
            signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace(dashboard_url=None)

    signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StoppedError):  # noqa: SIM117  # from either line, as the parameter says
        with cluster.connect(ClusterConfig()):
            signal.raise_signal(signal.SIGTERM)


def test_a_runs_own_ray_has_a_token_that_no_setting_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "that of another cluster")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    before, tokens = dict(os.environ), set[str]()
    for _ in range(2):
        with private() as folder:
            token = folder / "token"
            assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, token)] == [0o700, 0o600]
            assert os.environ["RAY_AUTH_MODE"] == "token"
            assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
            assert "RAY_AUTH_TOKEN" not in os.environ
            assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == loopback()
            assert not [name for name, value in os.environ.items() if token.read_text() in value]
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert AuthenticationTokenLoader.instance().get_token_for_http_header() == {
                "authorization": f"Bearer {token.read_text()}"
            }
            tokens.add(token.read_text())
        assert not folder.exists()
        assert dict(os.environ) == before
        assert get_authentication_mode() == AuthenticationMode.DISABLED  # tests/conftest.py
    assert sorted(map(len, tokens)) == [64, 64]


def test_a_long_temporary_folder_leaves_room_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with private() as folder:
        assert folder.parent == Path("/tmp")


def test_where_no_private_folder_can_be_made_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/ray")
    with (
        pytest.raises(ClusterError, match=r"/dev/null/ray: cannot create a folder for a local Ray: .*set RAY_TMPDIR"),
        private(),
    ):
        pass


BOTH = {"default": "10.0.0.1:2", "other": "10.0.0.1:3"}


@dataclass(frozen=True)
class Process:
    """What `psutil` tells of one."""

    info: Mapping[str, Any]


def raylet(temp: Path, address: str) -> Process:
    return Process({"cmdline": ["/lib/ray/raylet", f"--temp_dir={temp}", f"--gcs-address={address}", "--labels="]})


@pytest.mark.parametrize(
    ("running", "noted", "found"),
    [
        ({}, {}, None),
        ({"own": "127.0.0.1:1"}, {}, None),  # a run's own, or a notebook's
        ({"default": "10.0.0.1:2"}, {"default": "10.0.0.1:2"}, "10.0.0.1:2"),
        ({"own": "127.0.0.1:1", "default": "10.0.0.1:2"}, {"default": "10.0.0.1:2"}, "10.0.0.1:2"),
        ({"own": "127.0.0.1:1", "other": "10.0.0.1:3"}, {"other": "10.0.0.1:3"}, "10.0.0.1:3"),  # --temp-dir
        ({"other": "10.0.0.1:3"}, {"other": "10.0.0.1:3", "default": "10.0.0.1:2"}, "10.0.0.1:3"),  # the last has ended
        (
            {"default": "10.0.0.1:2", "other": "10.0.0.1:3"},
            {"default": "10.0.0.1:2", "other": "10.0.0.1:3"},
            "10.0.0.1:2",
        ),
        ({"one": "10.0.0.1:4", "other": "10.0.0.1:3"}, {"one": "10.0.0.1:4", "other": "10.0.0.1:3"}, "several"),
        ({}, {"default": "10.0.0.1:2"}, "10.0.0.1:2"),  # its processes are those of another container
    ],
)
def test_auto_is_a_cluster_that_ray_start_has_made(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    running: Mapping[str, str],
    noted: Mapping[str, str],
    found: str | None,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folders = {name: tmp_path / ("ray" if name == "default" else name) for name in (*running, *noted)}
    for name, address in noted.items():
        folders[name].mkdir()
        (folders[name] / "ray_current_cluster").write_text(address)
    strangers = [Process({"cmdline": None}), Process({"cmdline": ["raylet"]}), Process({"cmdline": ["vi", "--x=y"]})]
    processes = [*strangers, *(raylet(folders[name], address) for name, address in running.items())]
    monkeypatch.setattr(psutil, "process_iter", lambda attrs: processes)
    if found in (None, "several"):
        said = r"several .*choose one: 10.0.0.1:3, 10.0.0.1:4" if found else r"a Ray started by a run does not count"
        with pytest.raises(ClusterError, match=rf"cluster.address='auto': cannot be reached: .*{said}"):
            cluster.connect(ClusterConfig(address="auto"))
        return
    assert cluster.find_cluster() == found


@pytest.mark.parametrize("address", [None, "auto"])
def test_jobs_are_sent_to_what_auto_means_too(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def find() -> str:
        raise ClusterError("no Ray cluster has a node on this machine")

    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "find_cluster", find)
    with pytest.raises(JobError, match=r"no Ray cluster has a node on this machine\nExpected the job server"):
        Jobs(address)


class Context:
    """What Ray tells a driver of its cluster."""

    def __init__(self, gcs_address: str) -> None:
        self.gcs_address = gcs_address


@pytest.fixture(params=["open", "asks for a token", "gone"])
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The head of a cluster as a stranger sees it, and its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    guarded = request.param == "asks for a token"

    def answer(request: bytes, context: Any) -> bytes:
        if guarded:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    service = {"GetAllNodeInfo": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", service)])
    port = server.add_insecure_port("127.0.0.1:0")
    if request.param != "gone":
        server.start()
    yield request.param, str(port)
    server.stop(None)


@pytest.mark.parametrize("node", ["127.0.0.1", "10.0.0.1"])
def test_a_cluster_that_lets_in_whoever_reaches_it_is_told_from_others(
    monkeypatch: pytest.MonkeyPatch, head: tuple[str, str], node: str
) -> None:
    kind, port = head
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Context(f"127.0.0.1:{port}"))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeManagerAddress": node}])
    assert cluster.is_open() == (kind == "open" and node == "10.0.0.1")


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    with pytest.raises(ClusterError, match=r"cluster.address='127.0.0.1:1': cannot be reached: .*refused"):
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
    with pytest.raises(
        ClusterError, match=r"cluster: \d workers with .* each need .*, the cluster has .* on nodes with"
    ):
        cluster.check_fits(ClusterConfig(**asked))


def test_a_node_must_hold_the_workers_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": gpus}} for gpus in (2.0, 2.0)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    asked: dict[str, Any] = {"workers": 4, "gpus_per_worker": 1.0}
    cluster.check_fits(ClusterConfig(**asked, workers_per_model=2))
    with pytest.raises(
        ClusterError, match=r"workers_per_model=4: one model needs 4 GPU of a node, the nodes have 2, 2"
    ):
        cluster.check_fits(ClusterConfig(**asked, workers_per_model=4))


def test_a_cluster_that_fails_under_a_run_is_a_cluster_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> None:
        raise RayActorError(error_msg="the mailbox went with the driver's node")

    monkeypatch.setattr(RayDispatcher, "_run", lose)
    with pytest.raises(ClusterError, match=r"RayActorError: the mailbox went .*\nFinished stages are kept: .* resume"):
        object.__new__(RayDispatcher).run(None, "", None)  # type: ignore[arg-type]  # neither is looked at
