"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge, one Ray node each.

Links can be cut and healed, hosts removed with all their processes. Needs root, `ip netns` and a Linux kernel.
"""

import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.integration.ray_runs import Process, ray_start, token_environment

PORT = 6379


def why_not() -> str:
    """Return why hosts cannot be made here; '' where they can."""
    name = f"cl-{os.getpid()}-try"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if made.returncode:
        return made.stderr.strip()
    ip("netns", "del", name)
    return ""


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30).stdout


class Hosts:
    """Hosts on one bridge; host 0 is the head, without CPUs. All are gone when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[int, str]()
        self._tag = f"{os.getpid() % 100000}"
        self._token = secrets.token_hex(32)
        self._temp = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets need short paths
        self._starts = 0
        ip("link", "add", self._bridge, "type", "bridge")
        ip("link", "set", self._bridge, "up")

    @property
    def _bridge(self) -> str:
        return f"clb{self._tag}"

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    @property
    def env(self) -> Mapping[str, str]:
        quick = {
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        }
        return token_environment(self._token, GLOO_SOCKET_IFNAME="eth0", **quick)

    def inside(self, number: int) -> list[str]:
        """Return what a command is prefixed with to run on a host."""
        return ["ip", "netns", "exec", self._made[number]]

    def add(self, number: int) -> None:
        """Make a host and link it to the bridge."""
        name, cable = f"cl-{self._tag}-{number}", f"clv{self._tag}{number}"
        ip("netns", "add", name)
        self._made[number] = name
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", cable, "master", self._bridge, "up")
        ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")

    def start_ray(self, number: int, blind: Path | None = None) -> None:
        """Start a host's Ray node; a blind one does not see a folder, as where a network file system is not mounted."""
        role = ["--head", f"--port={PORT}", "--num-cpus=0"] if number == 0 else []
        role = role or [f"--address={self.address(0)}:{PORT}", "--num-cpus=1"]
        temp = Path(self._temp.name) / str(self._starts)
        self._starts += 1
        command = ray_start(f"--node-ip-address={self.address(number)}", f"--temp-dir={temp}", *role)
        if blind is not None:
            hide = f"mount -t tmpfs none {blind} && exec {' '.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", hide]
        log = self._folder / f"host-{number}-{self._starts}.log"
        Process([*self.inside(number), *command], self._folder, self.env, log).has_joined()

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        ip("link", "set", f"clv{self._tag}{number}", "down")

    def heal(self, number: int) -> None:
        """Plug it in again."""
        ip("link", "set", f"clv{self._tag}{number}", "up")

    def kill(self, number: int) -> None:
        """End all processes of a host, at once."""
        for pid in ip("netns", "pids", self._made[number]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self, number: int) -> None:
        """Take a host away, with all its processes."""
        self.kill(number)
        ip("netns", "del", self._made.pop(number))

    def close(self) -> None:
        for number in sorted(self._made, reverse=True):
            self.remove(number)
        ip("link", "del", self._bridge)
        self._temp.cleanup()
