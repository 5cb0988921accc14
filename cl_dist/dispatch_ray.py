"""Runs stages on a Ray cluster: Train on a gang (Ray Train), everything that comes in shards on an actor pool.

The gang's processes outlive a stage, since starting them costs more than many a task: one `TorchTrainer.fit` serves all
Train stages of a run and of its baselines. Its ranks fetch stages from a mailbox actor; a gang that lost a worker is
started again by Ray Train and finds the current stage still there. While the pool works the gang waits, so the pool
borrows the gang's CPUs and GPUs instead of asking for more; before the gang works the pool drops its model.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_dist.errors import ClDistError, ClusterError, TrainingError
from cl_dist.parallel.world import PROCESS_ENV, World
from cl_dist.run_config import ClusterConfig
from cl_dist.stages import evaluate, train
from cl_dist.stages.job import Job
from cl_dist.tracking import Tracker

log = logging.getLogger(__name__)
POLL_S = 0.1
ACTOR_TIMEOUT_S = 60.0
"""How long a call may take that only passes a message."""
PASSED_ON = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DS_ACCELERATOR", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank of the gang lives: the node and the GPUs that the pool may borrow."""

    rank: int
    node: str
    gpus: str
    pid: int


@dataclass(frozen=True, slots=True)
class Parcel:
    """A Train stage on its way to the gang."""

    number: int
    job: Job
    out: str
    logs: str


class Mailbox:
    """Carries stages to the gang and news back. Lives in an actor of its own, so it outlives a crashed gang."""

    def __init__(self) -> None:
        self._parcel: Parcel | None = None
        self._done, self._closed = -1, False
        self._error: ClDistError | None = None
        self._events: list[dict[str, Any]] = []
        self._places: dict[int, Place] = {}
        self._starts = 0

    async def hello(self, place: Place) -> None:
        """Take note of a rank that has started."""
        self._places[place.rank] = place
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
        self._parcel, self._error = parcel, None

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
    _enter(config["cwd"])
    world = World.current()
    context = ray.get_runtime_context()
    place = Place(world.rank, context.get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid())
    ray.get(mailbox.hello.remote(place), timeout=ACTOR_TIMEOUT_S)
    while True:
        parcel = ray.get(mailbox.fetch.remote(after), timeout=ACTOR_TIMEOUT_S)
        if parcel == "closed":
            return
        if parcel == "wait":
            continue
        _log_to(Path(parcel.logs) / f"rank-{world.rank}.log")
        try:
            train.run(parcel.job, Path(parcel.out), _Throttled(mailbox))
        except ClDistError as error:
            ray.get(mailbox.fail.remote(error), timeout=ACTOR_TIMEOUT_S)
            raise
        world.gather(None)  # rank 0 has written its files, and nobody is still reading an input
        if world.rank == 0:
            ray.get(mailbox.done.remote(parcel.number), timeout=ACTOR_TIMEOUT_S)
        after = parcel.number
        gc.collect()  # engines hold themselves in cycles, and the next stage builds another


def _enter(folder: str) -> None:
    """Go where the driver is, so that relative paths of the run file mean the same on a cluster that was joined."""
    if os.path.isdir(folder):
        os.chdir(folder)


class _Throttled:
    """Sends a few step events a second and all others."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["event"] != "step" or now - self._last > 0.3:
            self._last = now
            self._mailbox.tell.remote(event)


def _log_to(path: Path) -> None:
    root = logging.getLogger("cl_dist")
    if not any(getattr(handler, "baseFilename", "") == str(path.absolute()) for handler in root.handlers):
        path.parent.mkdir(parents=True, exist_ok=True)
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        file = logging.FileHandler(path, encoding="utf8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-5s %(name)s  %(message)s"))
        root.addHandler(file)
        root.setLevel(logging.INFO)


class ShardWorker:
    """An actor of the pool: holds one model at a time and works on one shard at a time."""

    def __init__(self, cwd: str, gpus: str | None) -> None:
        _enter(cwd)
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # before torch looks
        self._stage: str | None = None
        self._scorer: evaluate.Scorer | None = None

    def score(self, stage: str, job: Job, shard: evaluate.Shard) -> evaluate.Scored:
        """Score a shard, loading the stage's model with the first one."""
        if stage != self._stage or self._scorer is None:
            self._scorer = None  # never two models resident
            self._stage, self._scorer = stage, evaluate.Scorer(job)
        return self._scorer.score(shard)

    def drop(self) -> None:
        """Free the model, so that the gang has the memory."""
        self._stage = self._scorer = None
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class RayDispatcher:
    """Gang and pool on a Ray cluster, for as many stages as are asked for. Close it when done."""

    def __init__(self, cluster: ClusterConfig, folder: Path) -> None:
        """Join or start the cluster.

        Raises:
            ClusterError: If it cannot be reached, or can never hold the gang.
        """
        self._cluster, self._folder = cluster, folder
        self._gang: _Gang | None = None
        self._pool: _Pool | None = None
        _connect(cluster)
        try:
            _check_fits(cluster)
        except ClusterError:
            ray.shutdown()
            raise

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        try:
            self._run(job, out, tracker)
        except RayError as error:
            raise ClusterError(
                f"the Ray cluster failed under the run: {type(error).__name__}: {_last_lines(error)}\n"
                "Finished stages are kept: `cl-dist resume` goes on from here."
            ) from error

    def _run(self, job: Job, out: str, tracker: Tracker) -> None:
        if job.stage.kind == "train":
            if self._pool is not None:
                self._pool.free(keep_actors=self._pool.borrowed)
                self._pool = self._pool if self._pool.borrowed else None
            if self._gang is None:
                self._gang = _Gang(self._cluster, self._folder)
            self._gang.train(job, out, tracker)
            return
        if self._pool is None:
            self._pool = _Pool(self._cluster, self._gang.places() if self._gang else None)
        results = self._pool.map(tracker, job, evaluate.shards(job))
        evaluate.merge(job, results, Path(out))

    def close(self) -> None:
        """End the gang and the pool and leave the cluster (or stop it, where this run started it)."""
        if self._pool is not None:
            self._pool.free(keep_actors=False)
        if self._gang is not None:
            self._gang.close()
        ray.shutdown()


def _connect(cluster: ClusterConfig) -> None:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    env = {name: os.environ.get(name, value) for name, value in PROCESS_ENV.items()}
    env |= {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("RAY_TRAIN_")}
    env["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of the run file mean the same on every worker
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": env},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # reachable from this machine alone
        wanted = math.ceil(cluster.workers * cluster.cpus_per_worker)
        cores = os.cpu_count() or 1
        if wanted > cores:
            log.warning(
                "cluster.workers=%d need %d CPUs, this machine has %d: they share",
                cluster.workers,
                wanted,
                cores,
            )
        settings |= {"num_cpus": max(wanted, cores), "_node_ip_address": "127.0.0.1"}
    else:
        _check_reachable(cluster.address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # "local", since None would join whatever a crashed driver left noted in Ray's temporary folder.
        ray.init(address=cluster.address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError, RayError, TimeoutError) as error:
        where = cluster.address or "a local Ray"
        raise ClusterError(f"cluster.address={cluster.address!r}: cannot reach {where}: {error}") from error
    except SystemExit:  # from Ray's own handler of SIGTERM
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # 'auto', or an address of another kind
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        raise ClusterError(
            f"cluster.address={address!r}: cannot reach it: {error}; expected HOST:PORT of a Ray head, 'auto', "
            "or nothing for a local Ray"
        ) from error


def _check_fits(cluster: ClusterConfig) -> None:
    """Fail at once where waiting would never end."""
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        have = [node.get(resource, 0.0) for node in nodes]
        places = sum(int(amount / each + 1e-6) for amount in have) if each else cluster.workers  # none spans two nodes
        if places < cluster.workers:
            raise ClusterError(
                f"cluster: {cluster.workers} workers with {each:g} {resource} each need {cluster.workers * each:g}, "
                f"the cluster has {sum(have):g} in all, on nodes of {', '.join(f'{amount:g}' for amount in have)}; "
                f"lower cluster.workers or {resource.lower()}s_per_worker, or add nodes"
            )


def _fit(cluster: ClusterConfig, storage: str, mailbox: Any, cwd: str) -> None:
    """Run the gang to its end. A Ray task: a thread of the driver would crash it when it leaves Ray in between."""
    use_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if use_gpu else {})
    TorchTrainer(
        gang_worker,
        train_loop_config={"mailbox": mailbox, "cwd": cwd},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"gang-{os.getpid()}-{int(time.time())}",  # a known name would make Ray Train restore its state
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    ).fit()


class _Gang:
    """The driver's end of the gang: one `fit`, fed through the mailbox."""

    def __init__(self, cluster: ClusterConfig, folder: Path) -> None:
        self._cluster, self._number, self._starts = cluster, 0, 1
        self._busy = False
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)
        self._mailbox: Any = kind.remote()  # beside the driver, so that no other node can take it along
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._fit = fit.remote(cluster, str((folder / "logs" / "ray").absolute()), self._mailbox, os.getcwd())

    def train(self, job: Job, out: str, tracker: Tracker) -> None:
        """Hand a Train stage to the gang and wait for it.

        Raises:
            ClusterError: If the gang does not start in time.
            TrainingError: If it failed more often than allowed.
        """
        number, self._number = self._number, self._number + 1
        parcel = Parcel(number, job, out, str(Path(out).parents[2] / "logs"))
        self._busy = True
        ray.get(self._mailbox.post.remote(parcel), timeout=ACTOR_TIMEOUT_S)
        deadline = time.monotonic() + self._cluster.start_timeout_s
        while True:
            news: dict[str, Any] = ray.get(self._mailbox.news.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in news["events"]:
                tracker.event(event)
            if news["error"] is not None:
                raise news["error"]
            if news["done"] >= number:
                self._busy = False
                return
            if news["starts"] > self._starts:
                self._starts = news["starts"]
                tracker.event({"event": "gang_restart", "starts": self._starts})
                log.warning("gang restarted stage=train starts=%d", self._starts)
            if cause := self._ended():
                raise TrainingError(
                    f"the gang failed more than cluster.max_failures={self._cluster.max_failures} times; last cause:\n"
                    f"{_last_lines(cause)}\nFinished stages are kept: `cl-dist resume` goes on from here."
                ) from cause
            if news["starts"] == 0 and time.monotonic() > deadline:
                raise ClusterError(
                    f"the gang of {self._cluster.workers} workers did not start within cluster.start_timeout_s="
                    f"{self._cluster.start_timeout_s:g}; free now: {ray.available_resources()}"
                )
            time.sleep(POLL_S)

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


def _last_lines(error: BaseException, count: int = 12) -> str:
    return "\n".join(str(error).strip().splitlines()[-count:])


class _Pool:
    """Actors that take shards one by one. A shard of a dead actor goes to a fresh one."""

    def __init__(self, cluster: ClusterConfig, places: list[Place] | None) -> None:
        self._cluster = cluster
        self._places: list[Place | None] = list(places) if places else [None] * cluster.workers
        self.borrowed = places is not None
        self._actors: list[Any] = [self._start(number) for number in range(len(self._places))]

    def _start(self, number: int) -> Any:
        place, cluster = self._places[number], self._cluster
        if place is None:
            kind = ray.remote(ShardWorker).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
            return kind.remote(os.getcwd(), None)
        here = NodeAffinitySchedulingStrategy(place.node, soft=True)
        kind = ray.remote(ShardWorker).options(num_cpus=0, num_gpus=0, scheduling_strategy=here)
        return kind.remote(os.getcwd(), place.gpus if cluster.gpus_per_worker else None)

    def map(
        self, tracker: Tracker, job: Job, shards: list[evaluate.Shard]
    ) -> list[tuple[evaluate.Shard, evaluate.Scored]]:
        """Score all shards, each once.

        Raises:
            TrainingError: If a shard failed more often than allowed.
            ClDistError: As raised by a worker.
        """
        stage, shared = f"{id(job)}-{time.monotonic()}", ray.put(job)
        waiting = deque(shards)
        running: dict[Any, tuple[int, evaluate.Shard]] = {}
        results: list[tuple[evaluate.Shard, evaluate.Scored]] = []
        failures: dict[evaluate.Shard, int] = {}
        idle = list(range(len(self._actors)))
        while waiting or running:
            while waiting and idle:
                number, shard = idle.pop(), waiting.popleft()
                running[self._actors[number].score.remote(stage, shared, shard)] = (number, shard)
            finished, _ = ray.wait(list(running), timeout=5.0)
            for future in finished:
                number, shard = running.pop(future)
                idle.append(number)
                try:
                    results.append((shard, ray.get(future)))
                    tracker.event({"event": "step", "step": len(results), "total_steps": len(shards)})
                    continue
                except RayTaskError as error:
                    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
                    if isinstance(cause, ClDistError):
                        raise cause from error
                except RayActorError as error:
                    cause = error
                    self._actors[number] = self._start(number)
                failures[shard] = failures.get(shard, 0) + 1
                if failures[shard] > self._cluster.max_failures:
                    raise TrainingError(
                        f"shard {shard} failed {failures[shard]} times; last: {_last_lines(cause)}"
                    ) from cause
                tracker.event({"event": "shard_retry", "shard": str(shard), "attempt": failures[shard] + 1})
                log.warning(
                    "shard retry shard=%s attempt=%d error=%s", shard, failures[shard] + 1, type(cause).__name__
                )
                waiting.append(shard)
        return results

    def free(self, keep_actors: bool) -> None:
        """Make room: drop the models, or end the actors."""
        if not keep_actors:
            for actor in self._actors:
                ray.kill(actor)
            return
        try:
            ray.get([actor.drop.remote() for actor in self._actors], timeout=ACTOR_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("pool actor gone while idle: %s", error)
            self._actors = [self._start(number) for number in range(len(self._places))]
