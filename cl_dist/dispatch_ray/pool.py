"""Pool of actors that compute shards, on the resources of the waiting gang or on their own."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_dist.dispatch_ray.cluster import (
    ACTOR_TIMEOUT_S,
    CapacityWatch,
    WorkerSlot,
    chdir_to_driver,
    free_resources,
    last_lines,
    secrets,
)
from cl_dist.dispatch_ray.watchdog import Watchdog, log_of, log_tails, remedy
from cl_dist.errors import ClDistError, ClusterError, TrainingError
from cl_dist.run_config import ClusterConfig
from cl_dist.run_events import Tracker
from cl_dist.stages.stage_job import Job

if TYPE_CHECKING:
    from cl_dist.stages.shards import Shard, ShardStore, Worker

log = logging.getLogger(__name__)
ACTOR = "actor"


class ShardWorker:
    """An actor of the pool: loads one model at a time and computes one shard at a time."""

    def __init__(self, number: int, cwd: str, gpus: str | None, secrets: Mapping[str, str]) -> None:
        chdir_to_driver(cwd)
        os.environ |= secrets
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # before torch is imported
        from cl_dist.stages.shards import import_workers

        import_workers()

        gc.freeze()  # garbage collections skip the imported modules
        self._number = number
        self._stage: str | None = None
        self._worker: Worker | None = None

    def run(self, stage: str, job: Job, shard: Shard, logs: str, timeout_s: float) -> Any:
        """Compute a shard within timeout_s; the first shard of a stage loads its model."""
        from cl_dist.stages.shards import sharded

        path = log_of(Path(logs), self._number, ACTOR)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf8") as file, Watchdog(timeout_s, file):
            print(f"{job.key}: {shard}", file=file, flush=True)  # names the shard above the stacks of a hang
            if stage != self._stage or self._worker is None:
                self._worker = None
                gc.collect()  # never two models in memory: accelerate's hooks form reference cycles
                self._stage, self._worker = stage, sharded(job.stage.kind).worker(job)
            return self._worker.run(shard)

    def drop(self) -> None:
        """Free the model's memory for the gang."""
        self._stage = self._worker = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def group_slots(slots: list[WorkerSlot], each: int) -> list[WorkerSlot]:
    """Group the slots of each node by `each`, one group per model; leftover slots are not used.

    Raises:
        ClusterError: If no node has enough slots for a group.
    """
    by_node: dict[str, list[WorkerSlot]] = {}
    for slot in slots:
        by_node.setdefault(slot.node, []).append(slot)
    found = [
        replace(mine[first], gpus=",".join(slot.gpus for slot in mine[first : first + each]))
        for mine in by_node.values()
        for first in range(0, len(mine) - each + 1, each)
    ]
    if not found:
        raise ClusterError(
            f"cluster.workers_per_model={each}: no node has that many of the {len(slots)} workers; lower it, or use "
            "nodes with more GPUs"
        )
    return found


class Pool:
    """Actors that compute one shard at a time. The shard of a dead actor goes to a new one."""

    def __init__(self, cluster: ClusterConfig, slots: list[WorkerSlot] | None) -> None:
        self._cluster = cluster
        self.slots = list(slots or [])
        """Slots of the gang whose resources are borrowed."""
        each = cluster.workers_per_model
        self._slots: list[WorkerSlot | None] = [None] * (cluster.workers // each)
        if slots:
            self._slots = list(group_slots(slots, each))
        self.borrowed = slots is not None
        self._actors: list[Any] = [self._start(number) for number in range(len(self._slots))]

    def _start(self, number: int) -> Any:
        slot, cluster = self._slots[number], self._cluster
        if slot is None:
            each = cluster.workers_per_model
            kind = ray.remote(ShardWorker).options(
                num_cpus=cluster.cpus_per_worker * each, num_gpus=cluster.gpus_per_worker * each
            )
            return kind.remote(number, os.getcwd(), None, secrets())
        here = NodeAffinitySchedulingStrategy(slot.node, soft=True)
        kind = ray.remote(ShardWorker).options(num_cpus=0, num_gpus=0, scheduling_strategy=here)
        return kind.remote(number, os.getcwd(), slot.gpus if cluster.gpus_per_worker else None, secrets())

    def map(self, tracker: Tracker, job: Job, finished: ShardStore, logs: Path) -> None:
        """Compute all missing shards, and store each result as it arrives.

        Every actor has a block of neighbouring shards, which it computes from the last to the first; when its block is
        finished, it takes the first shard of the longest block. The pool does not wait for actors that cannot start on
        a full cluster as long as others work.

        Raises:
            TrainingError: If a shard fails more than max_failures times.
            ClusterError: If no actor starts in time, or nodes are lost for too long.
            ClDistError: As raised by a worker.
        """
        shards, total = finished.missing, len(finished.shards)
        stage, shared = f"{id(job)}-{time.monotonic()}", ray.put(job)
        bounds = [len(shards) * number // len(self._actors) for number in range(len(self._actors) + 1)]
        blocks = [deque(shards[first:end]) for first, end in pairwise(bounds)]
        running: dict[Any, tuple[int, Shard]] = {}
        failures: dict[Shard, int] = {}
        starting = {actor.__ray_ready__.remote(): number for number, actor in enumerate(self._actors)}
        idle: list[int] = []
        capacity, worked = CapacityWatch(self._cluster), time.monotonic()
        while any(blocks) or running:
            capacity.check()
            if running or idle:
                worked = time.monotonic()
            elif time.monotonic() - worked > self._cluster.start_timeout_s:
                raise ClusterError(
                    f"{job.key}: none of {len(self._actors)} actors started within cluster.start_timeout_s="
                    f"{self._cluster.start_timeout_s:g}; {free_resources()}"
                )
            while any(blocks) and idle:
                number = idle.pop()
                shard = blocks[number].pop() if blocks[number] else max(blocks, key=len).popleft()
                call = self._actors[number].run.options(name=job.key)  # the name on Ray's dashboard
                running[call.remote(stage, shared, shard, str(logs), self._cluster.progress_timeout_s)] = (
                    number,
                    shard,
                )
            ended, _ = ray.wait([*running, *starting], timeout=5.0)
            for future in ended:
                if future in starting:
                    idle.append(starting.pop(future))  # a dead actor fails on its first shard
                    continue
                number, shard = running.pop(future)
                try:
                    finished.keep(shard, ray.get(future))
                    idle.append(number)
                    tracker.event({"event": "step", "step": total - len(finished.missing), "total_steps": total})
                    continue
                except RayTaskError as error:
                    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
                    if isinstance(cause, ClDistError):
                        raise cause from error
                    idle.append(number)
                except RayActorError as error:
                    cause = error
                    self._actors[number] = self._start(number)
                    starting[self._actors[number].__ray_ready__.remote()] = number
                failures[shard] = failures.get(shard, 0) + 1
                if failures[shard] > self._cluster.max_failures:
                    words = f"{last_lines(cause)}\n{log_tails(logs, [number], ACTOR)}\n"
                    raise TrainingError(
                        f"{job.key}: {shard} failed {failures[shard]} times; last cause:\n{words}{remedy(words)}"
                        "Finished stages and shards are kept: `cl-dist resume` continues from there."
                    ) from cause
                tracker.event({"event": "shard_retry", "shard": str(shard), "attempt": failures[shard] + 1})
                log.warning(
                    "shard retry shard=%s attempt=%d error=%s", shard, failures[shard] + 1, type(cause).__name__
                )
                blocks[number].append(shard)

    def release(self, keep_actors: bool) -> None:
        """Free resources: drop the models, or also end the actors."""
        if not keep_actors:
            for actor in self._actors:
                ray.kill(actor)
            return
        try:
            ray.get([actor.drop.remote() for actor in self._actors], timeout=ACTOR_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("pool actor lost while idle: %s", error)
            self._actors = [self._start(number) for number in range(len(self._slots))]
