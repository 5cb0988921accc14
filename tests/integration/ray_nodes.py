"""A Ray cluster started by hand, as a user would: `ray start` for a head and a node, with a token, on one machine."""

import os
import random
import secrets
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.integration.ray_runs import START_S, Process, ray_start, token_environment, wait_for


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
        self._started: list[Process] = []
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
        bins = os.pathsep.join([str(self._folder / "bin"), os.environ["PATH"]])
        return token_environment(self._token, PATH=bins, RAY_gcs_rpc_server_reconnect_timeout_s="10")

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
        command = ray_start("--node-ip-address=127.0.0.1", f"--temp-dir={self._temp.name}/{number}", *args)
        node = Process(command, self._folder, self.env, self._folder / f"node-{number}.log")
        self._started.append(node)
        node.has_joined()

    def kill(self, number: int) -> None:
        """Kill a node with all its processes, at once; 0 is the head."""
        self._started[number].kill()

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        for node in self._started:
            node.close()
        self._temp.cleanup()
