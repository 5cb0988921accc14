"""A Ray cluster started by hand, as a user would: `ray start` for a head and a node, with a token, on one machine."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.integration import ray_runs
from tests.integration.ray_runs import START_S, wait_for


def free_port() -> int:
    """Return a port that is free now, below those that the system gives to connections: it is bound seconds later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Nodes:
    """A head without CPUs and nodes with one each; all are gone when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = secrets.token_hex(32)
        self._gcs, self._dashboard = free_port(), free_port()
        self._temp = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets need short paths
        self._started: list[subprocess.Popen[bytes]] = []
        self.start_head()

    @property
    def address(self) -> str:
        """Where drivers join."""
        return f"127.0.0.1:{self._gcs}"

    @property
    def url(self) -> str:
        """Where jobs are sent."""
        return f"http://127.0.0.1:{self._dashboard}"

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of every process of the cluster, and of those who talk with it."""
        here = {name: value for name, value in ray_runs.environment().items() if name != "RAY_ADDRESS"}
        bins = os.pathsep.join([str(self._folder / "bin"), str(Path(sys.executable).parent), here["PATH"]])
        quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**here, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "PATH": bins, **quick}

    @property
    def headers(self) -> dict[str, str]:
        """What a browser sends along."""
        return {"Authorization": f"Bearer {self._token}"}

    def start_head(self) -> None:
        """Start the head, as the first process or again."""
        dashboard = [f"--dashboard-port={self._dashboard}", "--dashboard-host=127.0.0.1"]
        self._start(
            "--head", f"--port={self._gcs}", *dashboard, "--num-cpus=0", f"--ray-client-server-port={free_port()}"
        )
        wait_for(lambda: self._listens(self._dashboard), START_S, "the head")

    def add(self) -> None:
        """Start one more node."""
        self._start(f"--address={self.address}", "--num-cpus=1")

    def _start(self, *args: str) -> None:
        # Nodes of one machine would share this port's default, and the second would have no agent to take jobs.
        args = (*args, f"--dashboard-agent-listen-port={free_port()}")
        programs = self._folder / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "cl-dist").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
        (programs / "cl-dist").chmod(0o755)
        number = len(self._started)
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            *args,
        ]
        path = self._folder / f"node-{number}.log"
        with path.open("wb") as log:
            self._started.append(
                subprocess.Popen(
                    [
                        *command,
                        "--node-ip-address=127.0.0.1",
                        f"--temp-dir={self._temp.name}/{number}",
                        "--disable-usage-stats",
                    ],
                    env=self.env,
                    cwd=self._folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

        wait_for(lambda: b"Ray runtime started" in path.read_bytes(), START_S, f"node {number}: {path}")

    def kill(self, number: int) -> None:
        """Kill a node with all its processes, at once; 0 is the head."""
        for pid in (self._started[number].pid, *ray_runs.family(self._started[number].pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._started[number].wait()

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        for process in self._started:
            process.terminate()
        for number, process in enumerate(self._started):
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            self.kill(number)
        self._temp.cleanup()
