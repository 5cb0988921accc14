"""The gang as the driver sees it: one Ray Train fit whose ranks fetch Train stages from a mailbox."""

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
    """Run the gang to its end. A Ray task: a thread of the driver would crash it when it leaves Ray in between."""
    import ray.train  # here, since the driver imports this module before it starts Ray
    from ray.train.torch import TorchConfig, TorchTrainer

    from cl_dist.dispatch_ray.rendezvous import FileConfig

    use_gpu = cluster.gpus_per_worker > 0
    backend = "nccl" if use_gpu else "gloo"
    scaling: Any = ray.train.ScalingConfig  # typed as its predecessor, which was not elastic
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
            name=f"gang-{os.getpid()}-{int(time.time())}",  # a known name would make Ray Train restore its state
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    ).fit()


class Gang:
    """The driver's end of the gang: one `fit`, fed through the mailbox."""

    def __init__(self, cluster: ClusterConfig, folder: Path, rendezvous: Path | None = None) -> None:
        """Start it; its ranks meet in a folder, where there is one that they share and others do not."""
        self._cluster, self._number, self._starts = cluster, 0, 1
        self._busy = False
        self.stop: BaseException | None = None
        """What has asked to stop while a stage came to its end; to be raised before the next one."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Beside the driver, so that no other node can take it along; its calls are no news for Ray's dashboard.
        on_driver: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
        self._mailbox: Any = ray.remote(Mailbox).options(max_concurrency=1000, **on_driver).remote(secrets())
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        storage, meeting_folder = str((folder / "logs" / "ray").absolute()), str(rendezvous) if rendezvous else None
        self._fit = fit.remote(cluster, storage, self._mailbox, os.getcwd(), meeting_folder)

    def train(self, job: Job, out: str, tracker: Tracker) -> None:
        """Hand a Train stage to the gang and wait for it.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If it failed more often than allowed.
        """
        number, self._number = self._number, self._number + 1
        ticket = StageTicket(number, job, out, str(Path(out).parents[2] / "logs"), self._cluster.progress_timeout_s)
        self._busy = True
        ray.get(self._mailbox.post.remote(ticket), timeout=ACTOR_TIMEOUT_S)
        self._mailbox.working.options(name=job.key).remote(number)
        try:
            self._watch(ticket, tracker)
        except (KeyboardInterrupt, StoppedError, SystemError) as told:
            stop = told.__cause__ if isinstance(told, SystemError) else told  # Ray's compiled code wraps what comes
            if not isinstance(stop, KeyboardInterrupt | StoppedError):
                raise
            if not self._save_before_stop(number, tracker):
                raise stop from None
            self.stop = stop  # the stage was at its end: first it is published

    def _save_before_stop(self, number: int, tracker: Tracker) -> bool:
        """Have a stage saved, if the gang ends a step in time; return whether it was done instead."""
        log.warning(
            "stopping: the stage is saved first, for up to cluster.stop_timeout_s=%g", self._cluster.stop_timeout_s
        )
        deadline = time.monotonic() + self._cluster.stop_timeout_s
        ignore_stops()  # schedulers send them again; Ctrl-C still ends the wait
        ray.get(self._mailbox.request.remote("stop"), timeout=ACTOR_TIMEOUT_S)
        while time.monotonic() < deadline and not self._failure():
            news: dict[str, Any] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in news["events"]:
                tracker.event(event)
            if number in (news["saved"], news["done"]):
                self._busy = False
                if number == news["done"]:
                    return True
                tracker.event({"event": "saved"})
                return False
            if news["error"] is not None:
                log.error("the stage could not be saved: %s", news["error"])
                return False
            if news["starts"] == 0:
                return False
            time.sleep(POLL_S)
        log.error("the stage was not saved in time: what is kept is its last checkpoint, if there is one")
        return False

    def _watch(self, ticket: StageTicket, tracker: Tracker) -> None:
        """Wait for a stage's end.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If it failed more often than allowed.
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
                    "Finished stages and the last checkpoint are kept: `cl-dist resume` goes on from here."
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
                log.warning("nodes drained under ranks=%s: the stage is saved", ranks)
                ray.get(self._mailbox.request.remote("save"), timeout=ACTOR_TIMEOUT_S)
            time.sleep(POLL_S)

    @staticmethod
    def _draining_nodes(slots: list[WorkerSlot]) -> set[str]:
        """Return the nodes of ranks that Ray has been told will be taken away."""
        draining: dict[str, int] = (
            state.get_draining_nodes()
        )  # what Ray Train and Serve ask too; there is no public way
        return draining.keys() & {slot.node for slot in slots}

    def _failure(self) -> BaseException | None:
        """Return why the gang has ended, None while it lives."""
        if not ray.wait([self._fit], timeout=0)[0]:
            return None
        try:
            ray.get(self._fit)
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, BaseException) else error
        return RuntimeError("the gang ended by itself")

    def slots(self) -> list[WorkerSlot]:
        """Return where the ranks live."""
        slots: list[WorkerSlot] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)["slots"]
        return slots

    def close(self) -> None:
        """Let the ranks return, so that Ray Train ends in order; in the middle of a stage they are ended."""
        try:
            if not self._busy:
                ray.get(self._mailbox.close.remote(), timeout=ACTOR_TIMEOUT_S)
                if ray.wait([self._fit], timeout=CLOSE_S)[0]:
                    return
            if not head_listens():  # Ray ends a process that asks a head which is gone
                return
            ray.cancel(self._fit, force=True, recursive=False)  # its controller dies with it, and the ranks with that
            _remove_placement_groups()
        except RayError as error:
            log.warning("gang not closed in order: %s", error)


def _remove_placement_groups() -> None:
    """Remove this job's placement groups until no more come.

    A controller that starts its gang again just as the driver leaves makes a group that Ray takes for a living job's,
    and its CPUs and GPUs would be taken for as long as the cluster lives.
    """
    job = ray.get_runtime_context().get_job_id()
    quiet_since = began = time.monotonic()
    while quiet_since + QUIET_S > time.monotonic() < began + CLOSE_S:
        for number, group in ray.util.placement_group_table().items():
            if number.endswith(job) and group["state"] != "REMOVED":
                ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
                quiet_since = time.monotonic()
        time.sleep(POLL_S)
