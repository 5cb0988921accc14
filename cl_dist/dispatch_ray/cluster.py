"""Connection to a Ray cluster: join or start it, check its capacity; helpers shared by gang and pool."""

import logging
import math
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address
from ray._private.utils import read_ray_address
from ray.exceptions import RayError

from cl_dist.dispatch_ray.private_ray import is_loopback, private, temp_dir
from cl_dist.errors import ClusterError
from cl_dist.run_config import ClusterConfig
from cl_dist.stopping import kept_from_children

log = logging.getLogger(__name__)
ACTOR_TIMEOUT_S = 60.0
"""Timeout of actor calls that only pass a message."""
CAPACITY_CHECK_S = 5.0
PROCESS_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Some virtual CPUs report AMX but fault on it: "Illegal instruction" in the first bfloat16 matmul.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
}
"""Set in every worker process before torch is imported, unless the user has set them."""
OPEN = "the Ray cluster requires no token: anyone who can reach a port of its nodes can run commands as its user"
CLOSE_IT = "start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN, and set both here"
PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DS_ACCELERATOR", "PYTHONPATH")

SECRETS = ("HF_TOKEN",)
"""Sent to workers by actor calls: Ray writes a runtime environment to a log file on every node."""


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """Node, GPUs and process of a rank of the gang; the pool may borrow its resources."""

    rank: int
    node: str
    gpus: str
    pid: int


class Connection(ExitStack):
    """A driver's connection to a cluster; closing it also stops a cluster that the run started."""

    folder: Path | None = None
    """The folder of a Ray that the run started."""
    dashboard: str | None = None
    """The address of Ray's dashboard; None if it has none."""


def connect(cluster: ClusterConfig) -> Connection:
    """Join the cluster at `cluster.address`, or start one on this machine for this run.

    Raises:
        ClusterError: If the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # the gang watches for preemption itself (gang.py)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    env = {name: os.environ.get(name, value) for name, value in PROCESS_ENV.items()}
    env |= {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("RAY_TRAIN_")}
    env["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # so that relative paths of the run file are valid on workers
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": env},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    with Connection() as connection:
        if cluster.address is None:
            connection.folder = connection.enter_context(private())
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # it would lack the run's environment
            # "local", since None would join the cluster recorded in Ray's temporary folder by a crashed driver.
            settings |= {"address": "local", "num_cpus": _cpus(cluster), "_temp_dir": temp_dir(connection.folder)}
        else:
            settings["address"] = _reachable(cluster.address)
        connection.callback(ray.shutdown)
        dashboard = _init(cluster.address, settings)
        left: Connection = connection.pop_all()
        left.folder, left.dashboard = connection.folder, dashboard
        return left


def _cpus(cluster: ClusterConfig) -> int:
    wanted, cores = math.ceil(cluster.workers * cluster.cpus_per_worker), os.cpu_count() or 1
    if wanted > cores:
        log.warning("cluster.workers=%d need %d CPUs, but this machine has %d", cluster.workers, wanted, cores)
    return max(wanted, cores)


def _init(address: str | None, settings: dict[str, Any]) -> str | None:
    """Start or join Ray, and return the address of its dashboard."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with kept_from_children():
            url: str | None = ray.init(**settings).dashboard_url
        return f"http://{url}" if url else None
    except (OSError, RuntimeError, ValueError, RayError, TimeoutError) as error:
        where = address or "a local Ray"
        raise ClusterError(f"cluster.address={address!r}: cannot reach {where}: {error}") from error
    except SystemExit:  # from Ray's SIGTERM handler
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _reachable(address: str) -> str:
    """Return the address to join; raise at once if nothing listens there, since Ray would retry for minutes."""
    where = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    try:
        where = find_cluster() if where == "auto" else where
        host, _, port = where.rpartition(":")
        if "://" in where or not port.isdigit():
            return where  # not HOST:PORT
        # Ray replaces a loopback address by the machine's public one.
        host = str(canonicalize_bootstrap_address(where)).rpartition(":")[0]
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, ClusterError) as error:
        raise ClusterError(
            f"cluster.address={address!r}: cannot be reached: {error}; set HOST:PORT of a Ray head or 'auto', or leave "
            "it out to start a local Ray"
        ) from error
    return where


def find_cluster() -> str:
    """Return the address for 'auto': the cluster that `ray start` has started on this machine.

    `ray start` records it in Ray's folder. A Ray started by a run or a notebook is not recorded.

    Raises:
        ClusterError: If there is no such cluster, or more than one.
    """
    last, found = read_ray_address(), set[str]()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if os.path.basename(words[0]) == "raylet":
            options = dict(word.partition("=")[::2] for word in words)
            address = options.get("--gcs-address", "")
            if address in (last, read_ray_address(options.get("--temp_dir"))):
                found.add(address)
    if len(found) > 1 and last not in found:
        raise ClusterError(f"several Ray clusters have nodes on this machine; choose one: {', '.join(sorted(found))}")
    where = next(iter(found)) if len(found) == 1 else last  # its processes may be invisible to this user
    if not where:
        raise ClusterError(
            "no Ray cluster has a node on this machine (a Ray started by a run does not count); start one with "
            "`ray start --head`, or set the address of another machine's"
        )
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does for 'auto'
    return str(where)


def is_open() -> bool:
    """Return whether the joined cluster accepts unauthenticated requests from other machines."""
    import grpc

    where = ray.get_runtime_context().gcs_address
    nodes = [str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    if all(is_loopback(host) for host in (where.rpartition(":")[0], *nodes)):
        return False
    with grpc.insecure_channel(where) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=5.0)
        except grpc.RpcError:
            return False
    return True


def head_listens() -> bool:
    """Return whether the head of the joined cluster still listens, without a call to Ray."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def check_fits(cluster: ClusterConfig) -> None:
    """Raise ClusterError if not even the minimum number of workers fits, so that a run does not wait forever."""
    workers = cluster.min_workers or cluster.workers
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        have = [node.get(resource, 0.0) for node in nodes]
        slots = sum(int(amount / each + 1e-6) for amount in have) if each else workers  # a worker does not span nodes
        if slots < workers:
            raise ClusterError(
                f"cluster: {workers} workers with {each:g} {resource} each need {workers * each:g}, "
                f"the cluster has {sum(have):g} in total, on nodes with {', '.join(f'{amount:g}' for amount in have)}; "
                f"lower cluster.workers or {resource.lower()}s_per_worker, or add nodes"
            )
        per_model = cluster.workers_per_model * each
        if per_model > max(have, default=0.0):
            raise ClusterError(
                f"cluster.workers_per_model={cluster.workers_per_model}: one model needs {per_model:g} {resource} of a "
                f"node, the nodes have {', '.join(f'{amount:g}' for amount in have)}; lower it, or use larger nodes"
            )


class CapacityWatch:
    """Checks whether the cluster still has enough nodes for the run: Ray would wait forever for a lost node."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._last_check = cluster, time.monotonic()
        self._missing_since: float | None = None

    def check(self) -> bool:
        """Check the cluster every few seconds; return whether this call did.

        Raises:
            ClusterError: If nodes have been missing for longer than lost_node_timeout_s.
        """
        now = time.monotonic()
        if now - self._last_check < CAPACITY_CHECK_S:
            return False
        self._last_check = now
        try:
            check_fits(self._cluster)
            self._missing_since = None
        except ClusterError as error:
            patience = self._cluster.lost_node_timeout_s
            if self._missing_since is None:
                self._missing_since = now
                log.warning("cluster too small for the run: waiting for nodes for up to %gs: %s", patience, error)
            if now - self._missing_since > patience:
                raise ClusterError(
                    "the cluster has lost nodes, and none has come back within cluster.lost_node_timeout_s="
                    f"{patience:g}: {error}\nFinished stages and the last checkpoint are kept: `cl-dist resume` "
                    "continues from there, also with fewer workers (cluster.workers=...)."
                ) from error
        return True


def free_resources() -> str:
    """Return a description of the cluster's free resources."""
    left = ray.available_resources()
    return "free now: " + ", ".join(f"{left.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def secrets() -> dict[str, str]:
    """Return the values of SECRETS in this process's environment."""
    return {name: os.environ[name] for name in SECRETS if name in os.environ}


def chdir_to_driver(folder: str) -> None:
    """Change to the driver's working directory, if it exists here, so that relative paths of the run file are valid."""
    if os.path.isdir(folder):
        os.chdir(folder)


def last_lines(error: BaseException, count: int = 12) -> str:
    """Return the end of an error's message."""
    return "\n".join(str(error).strip().splitlines()[-count:])
