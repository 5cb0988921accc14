"""Two processes in one gloo group, kept for the whole test run: distributed maths without a start per test.

A start costs seconds (imports), a job on warm ranks milliseconds. Ranks that hang or fall out of step are
killed, and the next job gets fresh ones.
"""

import faulthandler
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

START_TIMEOUT_S = 90.0  # importing torch and DeepSpeed on a busy machine
GRACE_S = 5.0  # for the other ranks, once one has failed: they may hang in a collective


class Ranks:
    """A pool of ranks. Jobs are plain functions of a test module, called as function(rank, world, *args)."""

    def __init__(self, world: int = 2) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Run a top-level function on every rank and return the results in rank order.

        Tensors travel by value. Each job starts with torch's generator at seed 0.

        Raises:
            TimeoutError: If a rank has not answered in time; the stacks of the ranks are on its stderr.
            RuntimeError: If a rank's process died, or its exception cannot be pickled.
            Exception: What the function raised, on the lowest rank that failed, with its traceback as a note.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((job, timeout_s)))
            answers = self._gather(timeout_s)
        except BaseException:  # also pytest-timeout's and Ctrl-C: these ranks are in an unknown state
            self._kill()
            raise
        failed = [rank for rank, answer in enumerate(answers) if answer is None or not answer[0]]
        if failed and (len(failed) < self.world or None in answers):
            self._kill()  # out of step: a leftover message could meet the next job's collective
        for rank in failed:
            if (answer := answers[rank]) is not None:
                _, error, text = answer
                error = error or RuntimeError(f"rank {rank} raised an exception that cannot be pickled")
                error.add_note(f"in rank {rank} of {self.world}:\n{text}")
                raise error
        return [answer[1] for answer in answers if answer is not None]

    def close(self) -> None:
        """Let the ranks end; kill those that do not."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE_S)
        self._kill()

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead rank reads as end of file here
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._gather(START_TIMEOUT_S)
        except BaseException:
            self._kill()
            raise

    def _gather(self, timeout_s: float) -> list[tuple[bool, Any, str] | None]:
        """Return one answer per rank; None for a rank that is silent for GRACE_S after another one failed."""
        answers: list[tuple[bool, Any, str] | None] = [None] * self.world
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        deadline = time.monotonic() + timeout_s
        failed = False
        while waiting:
            ready = wait(list(waiting), deadline - time.monotonic())
            if not ready:
                if failed:
                    return answers
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {timeout_s} s")
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = answer = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(GRACE_S)
                    code = self._processes[rank].exitcode
                    raise RuntimeError(f"rank {rank} died with exit code {code}") from None
                if not answer[0]:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()  # ours only, by pid
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _work(rank: int, world: int, port: int, pipe: Connection) -> None:
    """Join the group, then answer jobs until the parent closes the pipe. The body of a rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # DeepSpeed would compile its shared-memory collectives (100 s, needs g++), which only inference uses.
    import deepspeed.ops
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The timeout only ends ranks whose parent was killed while they hang; jobs have their own.
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
    pipe.send_bytes(pickle.dumps((True, None, "")))
    while True:
        try:
            job, timeout_s = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        faulthandler.dump_traceback_later(0.9 * timeout_s)  # a hang then shows where
        try:
            function, args = pickle.loads(job)  # imports the test's module
            torch.manual_seed(0)
            answer = pickle.dumps((True, function(rank, world, *args), ""))
        except Exception as error:
            answer = pickle.dumps((False, _picklable(error), traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(answer)
    torch.distributed.destroy_process_group()


def _picklable(error: Exception) -> Exception | None:
    """Return the error if it survives a round trip, else None."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
