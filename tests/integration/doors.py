"""The doors of processes: which sockets listen, from where they can be reached, and what they do for a stranger.

A door is tried with every HTTP path and every gRPC method of Ray that lists, submits, reads or stops something. It is
open where something else answers than a refusal.
"""

import http.client
import importlib
import os
import pkgutil
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.core.generated as protocols

WAIT_S, ANSWER_S = 3.0, 60.0
"""How long a door may take to open, and to answer: on a busy machine."""
LISTENS = "0A"
"""The state of a socket in /proc/net/tcp."""
READS = (
    ("GET", "/api/version"),
    ("GET", "/api/jobs/"),
    ("GET", "/api/job_agent/jobs/none/logs"),
    ("GET", "/api/cluster_status"),
    ("GET", "/api/v0/actors"),
    ("GET", "/api/v0/logs?node_id=none"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/logical/actors"),
    ("GET", "/metrics"),
    ("POST", "/get_runtime_envs_info"),
)
WRITES = (
    ("POST", "/api/jobs/"),
    ("POST", "/api/jobs/none/stop"),
    ("DELETE", "/api/jobs/none"),
    ("POST", "/api/job_agent/jobs/"),
    ("POST", "/api/job_agent/jobs/none/stop"),
    ("DELETE", "/api/job_agent/jobs/none"),
    ("PUT", "/api/packages/gcs/none.zip"),
    ("POST", "/get_or_create_runtime_env"),
    ("POST", "/delete_runtime_env_if_possible"),
)
NO_SUCH = (404, 405)
REFUSED = (401, 403)
LISTS = (  # what the holder of the token may call without an effect
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
)
NOT_IN_PYTHON = (
    *(f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects")),
    "/ray.rpc.syncer.RaySyncer/StartSync",
)


@dataclass(frozen=True, order=True)
class Door:
    """A socket that listens."""

    address: str
    port: int
    who: str

    @property
    def is_local(self) -> bool:
        """Whether it listens on the loopback interface alone."""
        return is_loopback(self.address)


def is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def listening(pids: Collection[int]) -> set[Door]:
    """Return the TCP sockets on which processes listen."""
    sockets = _listening_sockets()
    doors: set[Door] = set()
    for pid in pids:
        with suppress(OSError):
            who = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    kind, _, inode = os.readlink(f"/proc/{pid}/fd/{number}").partition(":[")
                    if kind == "socket" and inode[:-1] in sockets:
                        doors.add(Door(*sockets[inode[:-1]], who[:120]))
    return doors


def _listening_sockets() -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS:
                address, port = fields[1].split(":")
                raw = bytes.fromhex(address)
                words = b"".join(raw[first : first + 4][::-1] for first in range(0, len(raw), 4))
                found[fields[9]] = (socket.inet_ntop(family, words), int(port, 16))
    return found


def outside() -> list[str]:
    """Return the addresses under which others reach this machine.

    A machine without any has 127.0.0.2: what listens on 127.0.0.1 does not answer there, what listens everywhere does.
    """
    known = [address for each in psutil.net_if_addrs().values() for address in each]
    found = [address.address for address in known if address.family in (socket.AF_INET, socket.AF_INET6)]
    return [address for address in found if not is_loopback(address) and "%" not in address] or ["127.0.0.2"]


def reaches(address: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((address, port), timeout=WAIT_S).close()
        return True
    return False


@dataclass(frozen=True)
class Tried:
    """What a door did for somebody."""

    speaks: str
    """grpc, http, or nothing that we know."""
    did: Mapping[str, str]
    """What was done for each path and method that was not refused."""


def tried(address: str, port: int, token: str | None, harmless: bool = False) -> Tried:
    """Try a door; with `harmless` only what has no effect, for somebody who may."""
    found = _tried_grpc(address, port, token, LISTS if harmless else methods())
    if found is None:
        found = _tried_http(address, port, token, READS if harmless else (*READS, *WRITES))
    return found or Tried("nothing that we know", {})


def methods() -> Iterator[str]:
    """Yield all that Ray's processes offer over gRPC."""
    for module in pkgutil.iter_modules(protocols.__path__):
        if module.name.endswith("_pb2"):
            described: Any = importlib.import_module(f"{protocols.__name__}.{module.name}")
            for service in described.DESCRIPTOR.services_by_name.values():
                yield from (f"/{service.full_name}/{method.name}" for method in service.methods)
    yield from NOT_IN_PYTHON


def _tried_grpc(address: str, port: int, token: str | None, names: Iterable[str]) -> Tried | None:
    import grpc

    with grpc.insecure_channel(f"[{address}]:{port}" if ":" in address else f"{address}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(WAIT_S)
        except grpc.FutureTimeoutError:
            return None
        # Ray ends its node where this is missing, also for one who holds no token.
        metadata = [("node_id", "ab" * 28), *([("authorization", f"Bearer {token}")] if token else [])]
        calls = {name: channel.unary_unary(name).future(b"", timeout=ANSWER_S, metadata=metadata) for name in names}
        did: dict[str, str] = {}
        for name, call in calls.items():
            code = call.code().name
            if code not in ("UNAUTHENTICATED", "UNIMPLEMENTED"):
                did[name] = code
        return Tried("grpc", did)


def _tried_http(address: str, port: int, token: str | None, paths: Iterable[tuple[str, str]]) -> Tried | None:
    did: dict[str, str] = {}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    for method, path in paths:
        connection = http.client.HTTPConnection(address, port, timeout=WAIT_S)
        try:
            connection.request(method, path, '{"entrypoint": "true"}' if method == "POST" else None, headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if status not in (*NO_SUCH, *REFUSED):
            did[f"{method} {path}"] = str(status)
    return Tried("http", did)
