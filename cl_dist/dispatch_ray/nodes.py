"""What each node of the cluster sees: the run folder, its libraries, its room. One small task on every node."""

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
"""How long the nodes may take to answer: the first process of each has to import Python and Ray."""
SEEN_S = 20.0
"""How long a network file system may take to show here what a node has written."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a node said about itself; `error` if it could not."""

    name: str
    """Host name and address."""
    resources: Mapping[str, float]
    versions: Mapping[str, str | None]
    reads: bool
    """Whether it sees what the driver wrote to the run folder."""
    writes: bool
    """Whether the driver sees what it wrote there."""
    room: NodeResources
    error: str = ""

    @property
    def sight(self) -> str:
        """What it sees of the run folder, in words."""
        if self.error:
            return self.error
        reads = "reads" if self.reads else "does not read"
        return f"{reads} what the driver writes there, and {'is read' if self.writes else 'its files do not come back'}"


def alive() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def name_of(node: Mapping[str, Any]) -> str:
    """Return how people know a node."""
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return str(host if host == address else f"{host} ({address})")


def check_storage(folder: Path) -> None:
    """Fail before any work where a node does not see the run folder. The driver's own node is not asked.

    Raises:
        ClusterError: With the names of those nodes.
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
    """Ask nodes about themselves: a file goes from here through the run folder to each, and one comes back.

    A node that has left the cluster before it answered is left out: Ray lists dead nodes until it misses them.
    """
    if not nodes:
        return []
    where = folder.absolute() / f".probe-{uuid.uuid4().hex}"
    where.mkdir(parents=True)
    try:
        (where / "driver").write_text("driver", encoding="utf8")
        deadline = time.monotonic() + PROBE_S
        asked = [(node, _ask(node["NodeID"], where)) for node in nodes]
        info = [_node_info(node, where, *_answer(node["NodeID"], future, where, deadline)) for node, future in asked]
        still = {node["NodeID"] for node in alive()}
        return [found for found, node in zip(info, nodes, strict=True) if not found.error or node["NodeID"] in still]
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _ask(node: str, where: Path) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=there, name="probe")
    return task.remote(os.getcwd(), str(where), node)


def _answer(node: str, future: Any, where: Path, deadline: float) -> tuple[dict[str, Any], str]:
    """Return what a node said, or {} and why it said nothing."""
    while True:
        try:
            return ray.get(future, timeout=max(0.0, deadline - time.monotonic())), ""
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError) as cause:
            # The node has left, or is leaving, or is so new that the driver's node has not met it yet.
            if time.monotonic() > deadline or all(known["NodeID"] != node for known in alive()):
                return {}, f"does not answer: {type(cause).__name__}"
            time.sleep(1.0)
            future = _ask(node, where)
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


def _look(cwd: str, where: str, node: str) -> dict[str, Any]:
    """Run on a node: read what the driver wrote, write an answer, and tell what is there."""
    chdir_to_driver(cwd)
    folder = Path(where)
    reads, writes = (folder / "driver").is_file(), False
    if reads:
        with suppress(OSError):
            (folder / node).write_text(node, encoding="utf8")
            writes = True
    return {"reads": reads, "writes": writes, "versions": versions(), "room": room(folder)}
