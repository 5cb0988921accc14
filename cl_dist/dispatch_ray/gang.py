"""The gang: one Ray Train fit whose ranks fetch Train stages from a mailbox, and the driver's end of it."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import state
from ray.exceptions import RayError, RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_dist.dispatch_ray.cluster import ACTOR_TIMEOUT_S, Place, check_fits, enter, last_lines
from cl_dist.dispatch_ray.life import Alive, last_words
from cl_dist.errors import ClDistError, ClusterError, StoppedError, TrainingError
from cl_dist.parallel.world import World
from cl_dist.run_config import ClusterConfig
from cl_dist.stages import train
from cl_dist.stages.job import Due, Job
from cl_dist.storage import told_when_full
from cl_dist.tracking import Tracker

log = logging.getLogger(__name__)
POLL_S = 0.1
FITS_S = 5.0


@dataclass(frozen=True, slots=True)
class Parcel:
    """A Train stage on its way to the gang."""

    number: int
    job: Job
    out: str
    logs: str
    step_timeout_s: float


class Mailbox:
    """Carries stages to the gang and news back. Lives in an actor of its own, so it outlives a crashed gang."""

    def __init__(self) -> None:
        self._parcel: Parcel | None = None
        self._done, self._closed = -1, False
        self._error: ClDistError | None = None
        self._events: list[dict[str, Any]] = []
        self._places: dict[int, Place] = {}
        self._starts = 0
        self._asked: Due = ""
        self._saved = -1

    async def hello(self, place: Place, size: int) -> None:
        """Take note of a rank that has started, in a gang of some size: an elastic one may have been larger."""
        self._places[place.rank] = place
        self._places = {rank: known for rank, known in self._places.items() if rank < size}
        self._starts += place.rank == 0

    async def fetch(self, after: int) -> Parcel | str:
        """Return the stage to work on, once there is one later than `after`; 'closed', or 'wait' to ask again."""
        for _ in range(100):
            if self._closed:
                return "closed"
            if self._parcel is not None and self._parcel.number > max(after, self._done):
                return self._parcel
            await asyncio.sleep(POLL_S)
        return "wait"

    async def post(self, parcel: Parcel) -> None:
        """Hand a stage to the gang."""
        self._parcel, self._error, self._asked = parcel, None, ""

    @ray.method(enable_task_events=True)
    async def working(self, number: int) -> None:
        """Last as long as a stage does: under the stage's name, for Ray's dashboard."""
        while self._done < number != self._saved and self._error is None and not self._closed:
            await asyncio.sleep(10 * POLL_S)

    async def ask(self, due: Due) -> None:
        """Ask the gang to save the stage it is at, or to save and leave it."""
        self._asked = due

    async def asks(self) -> Due:
        """Return what it is asked for; to save only once."""
        asked = self._asked
        self._asked = "stop" if asked == "stop" else ""
        return asked

    async def saved(self, number: int) -> None:
        """Take note that a stage was left, saved, because it was asked for; nobody shall go on with it."""
        self._saved, self._parcel = number, None

    async def tell(self, event: dict[str, Any]) -> None:
        """Pass on a progress event."""
        self._events.append(event)

    async def done(self, number: int) -> None:
        """Take note that a stage is finished on all ranks."""
        self._done = max(self._done, number)

    async def fail(self, error: ClDistError) -> None:
        """Take note of an error that a restart would not cure, and take the stage back: nobody shall try it again."""
        self._error, self._parcel = self._error or error, None

    async def news(self) -> dict[str, Any]:
        """Return what happened; events are handed out once."""
        events, self._events = self._events, []
        places = [self._places[rank] for rank in sorted(self._places)]
        return {
            "events": events,
            "done": self._done,
            "saved": self._saved,
            "error": self._error,
            "places": places,
            "starts": self._starts,
        }

    async def close(self) -> None:
        """Let the gang go home."""
        self._closed = True


def gang_worker(config: Mapping[str, Any]) -> None:
    """Run on every rank of the gang: fetch a stage, train it, fetch the next; start over at the current one."""
    mailbox, after = config["mailbox"], -1
    enter(config["cwd"])
    world = World.current()
    context = ray.get_runtime_context()
    # Its own GPUs: CUDA_VISIBLE_DEVICES names those of all ranks of its node.
    gpus = ",".join(map(str, context.get_accelerator_ids().get("GPU", [])))
    place = Place(world.rank, context.get_node_id(), gpus, os.getpid())
    ray.get(mailbox.hello.remote(place, world.size), timeout=ACTOR_TIMEOUT_S)
    while True:
        parcel = ray.get(mailbox.fetch.remote(after), timeout=ACTOR_TIMEOUT_S)
        if parcel == "closed":
            return
        if parcel == "wait":
            continue
        alive = Alive(parcel.step_timeout_s, _log_to(Path(parcel.logs) / f"rank-{world.rank}.log"))
        try:
            with told_when_full(parcel.out):
                train.run(parcel.job, Path(parcel.out), _Throttled(mailbox), lambda: _asks(mailbox), alive)
        except StoppedError:
            if world.rank == 0:
                ray.get(mailbox.saved.remote(parcel.number), timeout=ACTOR_TIMEOUT_S)
            after = parcel.number
            gc.collect()
            continue
        except ClDistError as error:
            ray.get(mailbox.fail.remote(error), timeout=ACTOR_TIMEOUT_S)
            raise
        world.gather(None)  # rank 0 has written its files, and nobody is still reading an input
        if world.rank == 0:
            ray.get(mailbox.done.remote(parcel.number), timeout=ACTOR_TIMEOUT_S)
        after = parcel.number
        gc.collect()  # engines hold themselves in cycles, and the next stage builds another


def _asks(mailbox: Any) -> Due:
    asked: Due = ray.get(mailbox.asks.remote(), timeout=ACTOR_TIMEOUT_S)
    return asked


class _Throttled:
    """Sends a few step events a second and all others."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["event"] != "step" or now - self._last > 0.3:
            self._last = now
            self._mailbox.tell.remote(event)


def _log_to(path: Path) -> Any:
    """Log to a file from now on, and return it."""
    root = logging.getLogger("cl_dist")
    if not any(getattr(handler, "baseFilename", "") == str(path.absolute()) for handler in root.handlers):
        path.parent.mkdir(parents=True, exist_ok=True)
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        file = logging.FileHandler(path, encoding="utf8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-5s %(name)s  %(message)s"))
        root.addHandler(file)
        root.setLevel(logging.INFO)
    return next(handler.stream for handler in root.handlers if isinstance(handler, logging.FileHandler))


def _fit(cluster: ClusterConfig, storage: str, mailbox: Any, cwd: str) -> None:
    """Run the gang to its end. A Ray task: a thread of the driver would crash it when it leaves Ray in between."""
    use_gpu = cluster.gpus_per_worker > 0
    scaling: Any = ray.train.ScalingConfig  # typed as its predecessor, which was not elastic
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if use_gpu else {})
    TorchTrainer(
        gang_worker,
        train_loop_config={"mailbox": mailbox, "cwd": cwd},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
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


class _Fits:
    """Watches whether the cluster can still hold the gang: Ray Train would wait for a lost node for ever."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._looked = cluster, time.monotonic()
        self._missing_since: float | None = None

    def look(self) -> bool:
        """Look every few seconds; return whether it was time to.

        Raises:
            ClusterError: If nodes have been missing for longer than lost_node_timeout_s.
        """
        now = time.monotonic()
        if now - self._looked < FITS_S:
            return False
        self._looked = now
        try:
            check_fits(self._cluster)
            self._missing_since = None
        except ClusterError as error:
            patience = self._cluster.lost_node_timeout_s
            if self._missing_since is None:
                self._missing_since = now
                log.warning("cluster too small for the gang, waiting for up to %gs: %s", patience, error)
            if now - self._missing_since > patience:
                raise ClusterError(
                    "the cluster has lost nodes, and none has come back within cluster.lost_node_timeout_s="
                    f"{patience:g}: {error}\nFinished stages and the last checkpoint are kept: `cl-dist resume` goes "
                    "on from here, also with fewer workers (cluster.workers=...)."
                ) from error
        return True


class Gang:
    """The driver's end of the gang: one `fit`, fed through the mailbox."""

    def __init__(self, cluster: ClusterConfig, folder: Path) -> None:
        self._cluster, self._number, self._starts = cluster, 0, 1
        self._busy = False
        self.stop: BaseException | None = None
        """What has asked to stop while a stage came to its end; to be raised before the next one."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Beside the driver, so that no other node can take it along; its calls are no news for Ray's dashboard.
        place: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
        self._mailbox: Any = ray.remote(Mailbox).options(max_concurrency=1000, **place).remote()
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._fit = fit.remote(cluster, str((folder / "logs" / "ray").absolute()), self._mailbox, os.getcwd())

    def train(self, job: Job, out: str, tracker: Tracker) -> None:
        """Hand a Train stage to the gang and wait for it.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If it failed more often than allowed.
        """
        number, self._number = self._number, self._number + 1
        parcel = Parcel(number, job, out, str(Path(out).parents[2] / "logs"), self._cluster.step_timeout_s)
        self._busy = True
        ray.get(self._mailbox.post.remote(parcel), timeout=ACTOR_TIMEOUT_S)
        self._mailbox.working.options(name=job.key).remote(number)
        try:
            self._watch(parcel, tracker)
        except (KeyboardInterrupt, StoppedError, SystemError) as told:
            stop = told.__cause__ if isinstance(told, SystemError) else told  # Ray's compiled code wraps what comes
            if not isinstance(stop, KeyboardInterrupt | StoppedError):
                raise
            if not self._comes_to_its_end(number, tracker):
                raise stop from None
            self.stop = stop  # the stage was at its end: first it is published

    def _comes_to_its_end(self, number: int, tracker: Tracker) -> bool:
        """Have a stage saved, if the gang ends a step in time; return whether it was done instead."""
        log.warning(
            "stopping: the stage is saved first, for up to cluster.stop_timeout_s=%g", self._cluster.stop_timeout_s
        )
        deadline = time.monotonic() + self._cluster.stop_timeout_s
        ray.get(self._mailbox.ask.remote("stop"), timeout=ACTOR_TIMEOUT_S)
        while time.monotonic() < deadline and not self._ended():
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

    def _watch(self, parcel: Parcel, tracker: Tracker) -> None:
        """Wait for a stage's end.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If it failed more often than allowed.
        """
        deadline = time.monotonic() + self._cluster.start_timeout_s
        fits, drained = _Fits(self._cluster), set[str]()
        while True:
            news: dict[str, Any] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in news["events"]:
                tracker.event(event)
            if news["error"] is not None:
                raise news["error"]
            if news["done"] >= parcel.number:
                self._busy = False
                return
            if news["starts"] > self._starts:
                self._starts = news["starts"]
                tracker.event({"event": "gang_restart", "starts": self._starts})
                log.warning("gang restarted stage=train starts=%d", self._starts)
            if cause := self._ended():
                raise TrainingError(
                    f"the gang failed more than cluster.max_failures={self._cluster.max_failures} times; last cause:\n"
                    f"{last_lines(cause)}\n{last_words(Path(parcel.logs), self._cluster.workers)}\n"
                    "Finished stages and the last checkpoint are kept: `cl-dist resume` goes on from here."
                ) from cause
            if news["starts"] == 0 and time.monotonic() > deadline:
                raise ClusterError(
                    f"the gang of {self._cluster.workers} workers did not start within cluster.start_timeout_s="
                    f"{self._cluster.start_timeout_s:g}; free now: {ray.available_resources()}"
                )
            if fits.look() and (leaving := self._leaving(news["places"]) - drained):
                drained |= leaving
                ranks = [place.rank for place in news["places"] if place.node in leaving]
                tracker.event({"event": "notice", "ranks": ranks})
                log.warning("nodes drained under ranks=%s: the stage is saved", ranks)
                ray.get(self._mailbox.ask.remote("save"), timeout=ACTOR_TIMEOUT_S)
            time.sleep(POLL_S)

    @staticmethod
    def _leaving(places: list[Place]) -> set[str]:
        """Return the nodes of ranks that Ray has been told will be taken away."""
        draining: dict[str, int] = (
            state.get_draining_nodes()
        )  # what Ray Train and Serve ask too; there is no public way
        return draining.keys() & {place.node for place in places}

    def _ended(self) -> BaseException | None:
        """Return why the gang has ended, None while it lives."""
        if not ray.wait([self._fit], timeout=0)[0]:
            return None
        try:
            ray.get(self._fit)
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, BaseException) else error
        return RuntimeError("the gang ended by itself")

    def places(self) -> list[Place]:
        """Return where the ranks live."""
        places: list[Place] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)["places"]
        return places

    def close(self) -> None:
        """Let the ranks return, so that Ray Train ends in order; in the middle of a stage they end with the driver."""
        if self._busy:
            return
        try:
            ray.get(self._mailbox.close.remote(), timeout=ACTOR_TIMEOUT_S)
            ray.wait([self._fit], timeout=20.0)
        except RayError as error:
            log.warning("gang not closed in order: %s", error)
