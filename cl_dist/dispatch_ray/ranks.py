"""Worker loop of the gang's ranks: fetch a stage from the mailbox, train it, fetch the next."""

import gc
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from cl_dist.dispatch_ray.cluster import ACTOR_TIMEOUT_S, WorkerSlot, chdir_to_driver
from cl_dist.dispatch_ray.watchdog import Watchdog, log_of
from cl_dist.errors import ClDistError, StoppedError
from cl_dist.stages.stage_job import SaveRequest
from cl_dist.storage import storage_errors


def gang_worker(config: Mapping[str, Any]) -> None:
    """Run on every rank of the gang: train the mailbox's stages; a restarted gang begins with the current stage."""
    from cl_dist.parallel.world import World  # imported here: Ray Train's controller imports this module too
    from cl_dist.stages import train

    gc.freeze()  # garbage collections skip the imported modules
    mailbox, after = config["mailbox"], -1
    chdir_to_driver(config["cwd"])
    world = World.current()
    context = ray.get_runtime_context()
    # Its own GPUs: CUDA_VISIBLE_DEVICES lists those of all ranks of its node.
    gpus = ",".join(map(str, context.get_accelerator_ids().get("GPU", [])))
    slot = WorkerSlot(world.rank, context.get_node_id(), gpus, os.getpid())
    os.environ |= ray.get(mailbox.hello.remote(slot, world.size), timeout=ACTOR_TIMEOUT_S)
    while True:
        ticket = ray.get(mailbox.fetch.remote(after), timeout=ACTOR_TIMEOUT_S)
        if ticket == "closed":
            return
        if ticket == "wait":
            continue
        watchdog = Watchdog(ticket.progress_timeout_s, _log_to(log_of(Path(ticket.logs), world.rank)))
        try:
            with storage_errors(ticket.out), watchdog:
                train.run(
                    ticket.job, Path(ticket.out), _ThrottledTracker(mailbox), lambda: _take_request(mailbox), watchdog
                )
        except StoppedError:
            if world.rank == 0:
                ray.get(mailbox.saved.remote(ticket.number), timeout=ACTOR_TIMEOUT_S)
            after = ticket.number
            _free_memory()
            continue
        except ClDistError as error:
            ray.get(mailbox.fail.remote(error), timeout=ACTOR_TIMEOUT_S)
            raise
        _free_memory()  # before the pool borrows these GPUs
        world.gather(None)  # rank 0 has written its files, and no rank still reads an input
        if world.rank == 0:
            ray.get(mailbox.done.remote(ticket.number), timeout=ACTOR_TIMEOUT_S)
        after = ticket.number


def _free_memory() -> None:
    """Free the stage's engine, which has reference cycles, and torch's cached GPU memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _take_request(mailbox: Any) -> SaveRequest:
    request: SaveRequest = ray.get(mailbox.take_request.remote(), timeout=ACTOR_TIMEOUT_S)
    return request


class _ThrottledTracker:
    """Forwards all events, but at most one step event per 0.3 seconds."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["event"] != "step" or now - self._last > 0.3:
            self._last = now
            self._mailbox.tell.remote(event)


def _log_to(path: Path) -> Any:
    """Redirect the log to a file, and return it."""
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
