"""Private Ray for a single run: on the loopback interface, with its own token, in a folder private to its user.

The token is in a file of that folder, and Ray's processes get the file's path: the token itself does not appear in any
environment, command line, log or job.
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
"""Maximum length of a socket's path."""
TOKEN_SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
UNGUARDED = {
    # Prometheus endpoints require no token; a private Ray ends with its run, and nothing collects its metrics.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


@contextmanager
def private() -> Iterator[Path]:
    """Prepare this process and its children to start a private Ray; yield its folder.

    Ray makes its own folder accessible to all users, so it is one level deeper: `temp_dir`.

    Raises:
        ClusterError: If no folder can be created.
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
        ray_constants.ENABLE_RAY_CLUSTER = False  # makes Ray use loopback; it replaces 127.0.0.1 by the public address
        yield folder
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = has_clusters
        _set(before)
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """Create a folder in Ray's temporary folder, or in /tmp if its path is too long for sockets."""
    base = get_default_system_temp_dir()
    if len(os.path.join(base, LONGEST_SOCKET)) > SOCKET_PATH:
        if "RAY_TMPDIR" in os.environ:
            log.warning("RAY_TMPDIR=%s: too long for the sockets of a local Ray; using /tmp instead", base)
        base = os.path.join(os.sep, "tmp")
    try:
        os.makedirs(base, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        raise ClusterError(
            f"{base}: cannot create a folder for a local Ray: {error}; set RAY_TMPDIR to a writable folder with free "
            "space"
        ) from error


def _set(settings: Mapping[str, str | None]) -> None:
    """Set or remove environment variables, and make Ray reload its configuration."""
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
        ClusterError: If there is no loopback interface.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in (socket.AF_INET, socket.AF_INET6) and is_loopback(each.address) for each in addresses):
            return name
    raise ClusterError("no network interface has a loopback address such as 127.0.0.1, which a local Ray needs")


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0].strip("[]")).is_loopback
    return host == "localhost"


def temp_dir(folder: Path) -> str:
    """Return Ray's folder for sockets and logs."""
    return str(folder / INNER)
