"""Driver side of the gang: one Ray Train fit whose ranks fetch Train stages from a mailbox."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID
from ray._private.state import state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_dist.dispatch_ray.cluster import (
    ACTOR_TIMEOUT_S,
    CapacityWatch,
    WorkerSlot,
    free_resources,
    head_listens,
    last_lines,
    secrets,
)
from cl_dist.dispatch_ray.mailbox import POLL_S, Mailbox, StageTicket
from cl_dist.dispatch_ray.ranks import gang_worker
from cl_dist.dispatch_ray.watchdog import log_tails, remedy
from cl_dist.errors import ClusterError, StoppedError, TrainingError
from cl_dist.run_config import ClusterConfig
from cl_dist.run_events import Tracker
from cl_dist.stages.stage_job import Job
from cl_dist.stopping import ignore_stops

log = logging.getLogger(__name__)
CLOSE_S, QUIET_S = 20.0, 2.0


def _fit(cluster: ClusterConfig, storage: str, mailbox: Any, cwd: str, rendezvous: str | None) -> None:
    """Run the gang until it ends. A Ray task: in a thread, it would crash a driver that disconnects from Ray."""
    import ray.train  # imported here: the driver imports this module before it starts Ray
    from ray.train.torch import TorchConfig, TorchTrainer

    from cl_dist.dispatch_ray.rendezvous import FileConfig

    use_gpu = cluster.gpus_per_worker > 0
    backend = "nccl" if use_gpu else "gloo"
    scaling: Any = ray.train.ScalingConfig  # its type hints lack the elastic arguments
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if use_gpu else {})
    TorchTrainer(
        gang_worker,
        train_loop_config={"mailbox": mailbox, "cwd": cwd},
        torch_config=FileConfig(backend, folder=rendezvous) if rendezvous else TorchConfig(backend),
        scaling_config=scaling(
            num_workers=cluster.workers if cluster.min_workers is None else (cluster.min_workers, cluster.workers),
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.elastic_interval_s,
        ),
        run_config=ray.train.RunConfig(
            name=f"gang-{os.getpid()}-{int(time.time())}",  # for an existing name Ray Train restores its state
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    ).fit()


class Gang:
    """The driver's end of the gang: one `fit`, fed through the mailbox."""

    def __init__(self, cluster: ClusterConfig, folder: Path, rendezvous: Path | None = None) -> None:
        """Start the gang; its ranks rendezvous over a file in a private shared folder, if one is given."""
        self._cluster, self._number, self._starts = cluster, 0, 1
        self._busy = False
        self.stop: BaseException | None = None
        """Stop request that arrived while a stage was finishing; raised before the next stage."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # On the driver's node, so that it survives the loss of other nodes; its calls are not shown on Ray's dashboard.
        on_driver: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
        self._mailbox: Any = ray.remote(Mailbox).options(max_concurrency=1000, **on_driver).remote(secrets())
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        storage, meeting_folder = str((folder / "logs" / "ray").absolute()), str(rendezvous) if rendezvous else None
        self._fit = fit.remote(cluster, storage, self._mailbox, os.getcwd(), meeting_folder)

    def train(self, job: Job, out: str, tracker: Tracker) -> None:
        """Hand a Train stage to the gang and wait for it.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If the gang fails more than max_failures times.
        """
        number, self._number = self._number, self._number + 1
        ticket = StageTicket(number, job, out, str(Path(out).parents[2] / "logs"), self._cluster.progress_timeout_s)
        self._busy = True
        ray.get(self._mailbox.post.remote(ticket), timeout=ACTOR_TIMEOUT_S)
        self._mailbox.working.options(name=job.key).remote(number)
        try:
            self._watch(ticket, tracker)
        except (KeyboardInterrupt, StoppedError, SystemError) as error:
            stop = error.__cause__ if isinstance(error, SystemError) else error  # Ray's compiled code wraps exceptions
            if not isinstance(stop, KeyboardInterrupt | StoppedError):
                raise
            if not self._save_before_stop(number, tracker):
                raise stop from None
            self.stop = stop  # the stage has finished: publish it first

    def _save_before_stop(self, number: int, tracker: Tracker) -> bool:
        """Request a checkpoint and wait for it; return whether the stage finished instead."""
        tracker.event({"event": "stopping", "for_at_most_s": self._cluster.stop_timeout_s})
        deadline, is_noted = time.monotonic() + self._cluster.stop_timeout_s, False
        ignore_stops()  # schedulers repeat the signal; Ctrl-C still ends the wait
        ray.get(self._mailbox.request.remote("stop"), timeout=ACTOR_TIMEOUT_S)
        while time.monotonic() < deadline and not self._failure():
            news: dict[str, Any] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in news["events"]:
                tracker.event(event)
                is_noted = is_noted or event["event"] == "saved"
            if number in (news["saved"], news["done"]):
                self._busy = False
                if number == news["done"]:
                    return True
                if not is_noted:  # rank 0 reports it with the step
                    tracker.event({"event": "saved"})
                return False
            if news["error"] is not None:
                log.error("the stage could not be saved: %s", news["error"])
                return False
            if news["starts"] == 0:
                return False
            time.sleep(POLL_S)
        log.error("the stage was not saved in time: falling back to its last checkpoint, if any")
        return False

    def _watch(self, ticket: StageTicket, tracker: Tracker) -> None:
        """Wait for the end of a stage.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If the gang fails more than max_failures times.
        """
        deadline = time.monotonic() + self._cluster.start_timeout_s
        capacity, drained = CapacityWatch(self._cluster), set[str]()
        while True:
            news: dict[str, Any] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in news["events"]:
                tracker.event(event)
            if news["error"] is not None:
                raise news["error"]
            if news["done"] >= ticket.number:
                self._busy = False
                return
            if news["starts"] > self._starts:
                self._starts = news["starts"]
                tracker.event({"event": "gang_restart", "starts": self._starts})
                log.warning("gang restarted stage=train starts=%d", self._starts)
            if cause := self._failure():
                words = f"{last_lines(cause)}\n{log_tails(Path(ticket.logs), range(self._cluster.workers))}\n"
                raise TrainingError(
                    f"{ticket.job.key}: the gang failed more than cluster.max_failures={self._cluster.max_failures} "
                    f"times; last cause:\n{words}{remedy(words)}"
                    "Finished stages and the last checkpoint are kept: `cl-dist resume` continues from there."
                ) from cause
            if news["starts"] == 0 and time.monotonic() > deadline:
                raise ClusterError(
                    f"{ticket.job.key}: the gang of {self._cluster.workers} workers did not start within "
                    f"cluster.start_timeout_s={self._cluster.start_timeout_s:g}; {free_resources()}"
                )
            if capacity.check() and (draining := self._draining_nodes(news["slots"]) - drained):
                drained |= draining
                ranks = [slot.rank for slot in news["slots"] if slot.node in draining]
                tracker.event({"event": "notice", "ranks": ranks})
                log.warning("nodes are being drained ranks=%s: saving the stage", ranks)
                ray.get(self._mailbox.request.remote("save"), timeout=ACTOR_TIMEOUT_S)
            time.sleep(POLL_S)

    @staticmethod
    def _draining_nodes(slots: list[WorkerSlot]) -> set[str]:
        """Return the nodes of ranks that Ray reports as draining."""
        draining: dict[str, int] = state.get_draining_nodes()  # as Ray Train and Serve do; there is no public API
        return draining.keys() & {slot.node for slot in slots}

    def _failure(self) -> BaseException | None:
        """Return the reason why the gang has ended, or None while it runs."""
        if not ray.wait([self._fit], timeout=0)[0]:
            return None
        try:
            ray.get(self._fit)
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, BaseException) else error
        return RuntimeError("the gang ended unexpectedly")

    def slots(self) -> list[WorkerSlot]:
        """Return the slots of the ranks."""
        slots: list[WorkerSlot] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)["slots"]
        return slots

    def close(self) -> None:
        """End the gang: ranks return and Ray Train ends normally; in the middle of a stage they are killed."""
        try:
            if not self._busy:
                ray.get(self._mailbox.close.remote(), timeout=ACTOR_TIMEOUT_S)
                if ray.wait([self._fit], timeout=CLOSE_S)[0]:
                    return
            if not head_listens():  # Ray kills a process that calls a head that is gone
                return
            ray.cancel(self._fit, force=True, recursive=False)  # this also ends its controller and the ranks
            _remove_placement_groups()
        except RayError as error:
            log.warning("gang not closed cleanly: %s", error)


def _remove_placement_groups() -> None:
    """Remove this job's placement groups until no more appear.

    A controller that restarts its gang just as the driver leaves creates a group that Ray assigns to a running job; its
    CPUs and GPUs would stay reserved as long as the cluster runs.
    """
    job = ray.get_runtime_context().get_job_id()
    quiet_since = began = time.monotonic()
    while quiet_since + QUIET_S > time.monotonic() < began + CLOSE_S:
        for number, group in ray.util.placement_group_table().items():
            if number.endswith(job) and group["state"] != "REMOVED":
                ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
                quiet_since = time.monotonic()
        time.sleep(POLL_S)
