"""Tiny runs on two Ray workers, and the command line as a process that can be stopped and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cl_dist.config import merged
from cl_dist.contract import tiny

ROOT = Path(__file__).parents[2]
START_S = 400.0
"""How long Ray and a gang may take to start on a busy machine."""
SETTINGS = {
    "run": {"dir": "runs"},  # relative, as a user has it
    "science": {"train": {"epochs": 10}},  # some seconds, so that a stage has a middle
    "cluster": {"dispatcher": "ray", "engine": "deepspeed", "workers": 2, "zero_stage": 2},
}


def tree(folder: Path, over: Mapping[str, Any]) -> Any:
    """Return a run file of three tasks; all that are made in one folder share model and data, so also results."""
    return tiny.tree(folder, merged(SETTINGS, over))


def save_run(folder: Path, name: str) -> Path:
    """Write a run file for the command line."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree(folder, {"run": {"name": name}})), encoding="utf8")
    return path


def events(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run so far, whole lines only."""
    try:
        text = (run / "metrics" / "events.jsonl").read_text(encoding="utf8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)


def token_environment(token: str, **more: str) -> dict[str, str]:
    """Return the environment of the processes of a cluster that asks for a token, and of those who talk with it."""
    here = {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}
    return {**here, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0", **more}


def ray_start(*args: str) -> list[str]:
    """Return the command that starts a node of a cluster and stays."""
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *args]


def environment() -> dict[str, str]:
    """Return an environment in which the packages are found, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


class Process:
    """A process with a session of its own, that is gone when the test is."""

    def __init__(self, args: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                args, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf8", errors="replace")

    def has_joined(self) -> None:
        """Wait until a `ray start` has made its node part of the cluster."""
        joined = "Ray runtime started"
        wait_for(lambda: joined in self.output or self.process.poll() is not None, START_S, str(self.log))
        assert self.process.poll() is None, self.output

    def kill(self) -> None:
        """End it, all processes below it and its session, at once."""
        for pid in (self.process.pid, *family(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.kill()


class Command:
    """`cl-dist` in a process and session of its own."""

    def __init__(
        self, folder: Path, *args: str, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()
    ) -> None:
        self._log = folder / f"{'-'.join(args).replace('/', '_')[:80]}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*inside, sys.executable, "-m", "launcher", *args],
                cwd=folder,
                env=env or environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds, but not for a process that has ended."""
        wait_for(lambda: condition() or self._process.poll() is not None, START_S, f"{what}\n{self.output}")
        assert condition(), f"ended with {self._process.returncode} before {what}:\n{self.output}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, if it has not ended; its Ray ends with it."""
        self._process.kill()
        self._process.wait()

    def end(self, timeout_s: float = START_S) -> int:
        """Wait for the process to end and return its exit code."""
        try:
            return self._process.wait(timeout_s)
        except BaseException:
            self.kill()
            raise

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf8", errors="replace")

    def family(self) -> dict[int, str]:
        """Return the processes below this one: (pid, what it runs)."""
        return family(self._process.pid)


def family(ancestor: int) -> dict[int, str]:
    """Return the processes below one: (pid, what it runs)."""
    parents: dict[int, int] = {}
    for pid in _pids():
        if (stat := _stat(pid)) is not None:
            parents[pid] = int(stat[1])
    found: dict[int, str] = {}
    front = {ancestor}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front}
        found |= {pid: identity(pid) for pid in front}
    return found


def identity(pid: int) -> str:
    """Return what tells a process from a later one with the same id; '' for one that is gone."""
    stat = _stat(pid)
    return "" if stat is None or stat[0] == "Z" else f"{stat[19]} {_command(pid)}"


def is_alive(pid: int, who: str) -> bool:
    """Return whether a process that `family` found is still there."""
    return identity(pid).split(" ")[0] == who.split(" ")[0] != ""


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name: state, parent, ..., and as the 20th the start time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except (FileNotFoundError, ProcessLookupError):
        return ""
