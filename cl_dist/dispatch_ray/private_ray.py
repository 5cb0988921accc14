"""A Ray of the run's own: on the loopback interface, with a token of its own, in a folder that only its user can enter.

The token lies in a file of that folder, and Ray's processes are told where: it is in no environment, command line, log
or job.
"""

import ipaddress
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

from cl_dist.errors import ClusterError

log = logging.getLogger(__name__)
PREFIX, INNER = "cl-ray-", "r"
LONGEST_SOCKET = f"{PREFIX}12345678/{INNER}/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead"
SOCKET_PATH = 107
"""Longest path that the system takes for a socket."""
TOKEN_SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
UNGUARDED = {
    # Prometheus' pages ask nobody for a token; a run's own Ray lasts as long as the run, and nothing collects from it.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


@contextmanager
def private() -> Iterator[Path]:
    """Prepare this process, and those that it starts, to start a Ray of its own; yield the folder for it.

    Ray lets everybody into its own folder, so that lies one deeper: `temp_dir`.

    Raises:
        ClusterError: If no folder can be made.
    """
    interface, folder = loopback(), _make_folder()
    token = folder / "token"
    settings = {
        **dict.fromkeys(TOKEN_SETTINGS),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        **UNGUARDED,
    }
    before = {name: os.environ.get(name) for name in settings}
    has_clusters = ray_constants.ENABLE_RAY_CLUSTER
    try:
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        _set(settings)
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's way to stay on loopback; it takes 127.0.0.1 for the public one
        yield folder
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = has_clusters
        _set(before)
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """Make a folder where Ray would make its own, or in /tmp where that has no room for the names of sockets."""
    base = get_default_system_temp_dir()
    if len(os.path.join(base, LONGEST_SOCKET)) > SOCKET_PATH:
        if "RAY_TMPDIR" in os.environ:
            log.warning("RAY_TMPDIR=%s: too long for the sockets of a local Ray, whose folder is in /tmp", base)
        base = os.path.join(os.sep, "tmp")
    try:
        os.makedirs(base, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        raise ClusterError(
            f"{base}: no folder for a local Ray can be made there: {error}; set RAY_TMPDIR to one with room in which "
            "you may write"
        ) from error


def _set(settings: Mapping[str, str | None]) -> None:
    """Set variables of the environment, or remove them, and have Ray read them again."""
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def loopback() -> str:
    """Return the name of the loopback interface.

    Raises:
        ClusterError: If there is none.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in (socket.AF_INET, socket.AF_INET6) and is_loopback(each.address) for each in addresses):
            return name
    raise ClusterError("no network interface has a loopback address such as 127.0.0.1, which a local Ray needs")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0].strip("[]")).is_loopback
    return host == "localhost"


def temp_dir(folder: Path) -> str:
    """Return where Ray puts its sockets and logs."""
    return str(folder / INNER)
