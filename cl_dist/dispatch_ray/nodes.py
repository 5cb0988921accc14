"""Probe of the cluster's nodes: access to the run folder, library versions, resources. One small task per node."""

import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_dist.dispatch_ray.cluster import chdir_to_driver
from cl_dist.errors import ClusterError
from cl_dist.run_events import versions
from cl_dist.storage import NodeResources, room

PROBE_S = 120.0
"""Timeout of the probes: the first process on each node has to start Python and import Ray."""
SEEN_S = 20.0
"""Time for a network file system to show files written on another node."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Result of a node's probe; `error` if it failed."""

    name: str
    """Host name and address."""
    resources: Mapping[str, float]
    versions: Mapping[str, str | None]
    reads: bool
    """Whether it sees the driver's files in the run folder."""
    writes: bool
    """Whether the driver sees its files there."""
    room: NodeResources
    error: str = ""

    @property
    def sight(self) -> str:
        """Description of the node's access to the run folder."""
        if self.error:
            return self.error
        reads = "sees" if self.reads else "does not see"
        return f"{reads} the driver's files, and the driver {'sees' if self.writes else 'does not see'} its files"


def alive() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def name_of(node: Mapping[str, Any]) -> str:
    """Return a node's host name and address for messages."""
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return str(host if host == address else f"{host} ({address})")


def check_storage(folder: Path) -> None:
    """Check that every node sees the run folder. The driver's own node is not probed.

    Raises:
        ClusterError: With the names of the nodes that do not.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in alive() if node["NodeID"] != here]
    blind = [info for info in probe(folder, others) if not (info.reads and info.writes)]
    if blind:
        views = "\n".join(f"  {info.name}: {info.sight}" for info in blind)
        raise ClusterError(
            f"run.dir={str(folder.parent)!r}: expected a folder that every node of the cluster sees, such as a network "
            f"file system; the driver is on {platform.node()}\n{views}"
        )


def probe(folder: Path, nodes: Sequence[Mapping[str, Any]]) -> list[NodeInfo]:
    """Probe nodes: each reads a file of the driver from the run folder, and writes one for the driver.

    Nodes that leave the cluster before they answer are omitted: Ray lists dead nodes until it notices.
    """
    if not nodes:
        return []
    where = folder.absolute() / f".probe-{uuid.uuid4().hex}"
    where.mkdir(parents=True)
    try:
        (where / "driver").write_text("driver", encoding="utf8")
        deadline = time.monotonic() + PROBE_S
        probes = [(node, _submit(node["NodeID"], where)) for node in nodes]
        info = [_node_info(node, where, *_answer(node["NodeID"], future, where, deadline)) for node, future in probes]
        still = {node["NodeID"] for node in alive()}
        return [found for found, node in zip(info, nodes, strict=True) if not found.error or node["NodeID"] in still]
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _submit(node: str, where: Path) -> Any:
    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_probe).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node, name="probe")
    return task.remote(os.getcwd(), str(where), node)


def _answer(node: str, future: Any, where: Path, deadline: float) -> tuple[dict[str, Any], str]:
    """Return a node's result, or {} and the reason for its absence."""
    while True:
        try:
            return ray.get(future, timeout=max(0.0, deadline - time.monotonic())), ""
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError) as cause:
            # The node has left, is leaving, or is too new to be known to the driver's node.
            if time.monotonic() > deadline or all(known["NodeID"] != node for known in alive()):
                return {}, f"does not answer: {type(cause).__name__}"
            time.sleep(1.0)
            future = _submit(node, where)
        except (RayError, GetTimeoutError) as cause:
            return {}, f"does not answer: {type(cause).__name__}"


def _node_info(node: Mapping[str, Any], where: Path, found: Mapping[str, Any], error: str) -> NodeInfo:
    answer, deadline = where / node["NodeID"], time.monotonic() + (0.0 if error else SEEN_S)
    while not answer.is_file() and found.get("writes") and time.monotonic() < deadline:
        time.sleep(0.2)
    return NodeInfo(
        name=name_of(node),
        resources=node["Resources"],
        versions=found.get("versions", {}),
        reads=found.get("reads", False),
        writes=answer.is_file(),
        room=found.get("room", NodeResources()),
        error=error,
    )


def _probe(cwd: str, where: str, node: str) -> dict[str, Any]:
    """Run on a node: read the driver's file, write an answer, and return versions and resources."""
    chdir_to_driver(cwd)
    folder = Path(where)
    reads, writes = (folder / "driver").is_file(), False
    if reads:
        with suppress(OSError):
            (folder / node).write_text(node, encoding="utf8")
            writes = True
    return {"reads": reads, "writes": writes, "versions": versions(), "room": room(folder)}
