"""What a run's own Ray lets a stranger do: on the network nothing, and on the machine nothing without its token."""

import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import ray_runs
from tests.integration.doors import Door, Tried, listening, outside, reaches, tried
from tests.integration.ray_runs import Command, events

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
WRONG = "f" * 64
HF = "hf_nobody_else_shall_read_this"


@dataclass(frozen=True)
class Seen:
    """What was seen of a run while its gang trained."""

    run: Path
    commands: Mapping[int, str]
    """The command line of every process, by its id."""
    environments: Mapping[int, bytes]
    doors: frozenset[Door]
    temp: Path
    """Ray's folder."""
    token: str
    modes: Mapping[str, int]
    """Permissions of that folder and of the token's file."""
    from_outside: Mapping[str, Tried]
    """What was done for somebody without a token, for each door that another machine reaches."""
    here: Mapping[Door, Mapping[str, Tried]]
    """What each door did for somebody on this machine with no token, a wrong one, and the right one."""
    joining: Mapping[str, subprocess.CompletedProcess[str]]
    """What commands did that look for a cluster of this machine."""
    files: Mapping[str, bytes]
    """All files of the run folder and of Ray's, but the token's."""
    output: str
    code: int
    left: bool
    """Whether Ray's folder was still there when the run had ended."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("doors")
    ray_runs.save_run(folder, "watched")
    run = folder / "runs" / "watched"
    command = Command(
        folder, "train", "watched.yaml", "science.train.epochs=2000", env={**ray_runs.environment(), "HF_TOKEN": HF}
    )
    try:
        command.wait_until(lambda: any(event["event"] == "round" for event in events(run)), "it trains")
        pids = {*command.family(), command.pid}
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in pids}
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in pids}
        doors = frozenset(listening(pids))
        temp = Path(next(word[11:] for each in commands.values() for word in each.split("\0") if "--temp_dir=" in word))
        temp = temp.parent  # Ray opens its own to everybody
        secret = next(iter(temp.glob("token")), None)
        token = secret.read_text() if secret else WRONG
        modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in (temp, *([secret] if secret else []))}

        def try_all(door: Door) -> Mapping[str, Tried]:
            return {
                "none": tried(door.address, door.port, None),
                "wrong": tried(door.address, door.port, WRONG),
                "right": tried(door.address, door.port, token, harmless=True),
            }

        from_outside = {
            f"{address} {door.port} {door.who}": tried(address, door.port, None)
            for door in sorted(doors)
            for address in outside()
            if reaches(address, door.port)
        }
        local = [door for door in sorted(doors) if reaches(door.address, door.port)]
        with ThreadPoolExecutor(4) as threads:
            here = dict(zip(local, threads.map(try_all, local), strict=True))
        joining = {
            " ".join(args): subprocess.run(
                [sys.executable, "-m", "launcher", *args],
                cwd=folder, env=ray_runs.environment(), capture_output=True, text=True, timeout=120,
            )
            for args in (["train", "watched.yaml", "run.name=other", "cluster.address=auto"], ["job", "list"])
        }  # fmt: skip
        places = [path for place in (run, temp) for path in place.rglob("*") if path != secret and path.is_file()]
        files = {str(path): path.read_bytes() for path in places}
        command.signal(signal.SIGTERM)
        code = command.end()
    finally:
        command.kill()
    return Seen(
        run, commands, environments, doors, temp, token, modes, from_outside, here, joining, files,
        command.output, code, temp.exists(),
    )  # fmt: skip


def test_all_doors_are_on_the_loopback_interface(seen: Seen) -> None:
    assert len(seen.doors) >= 8  # gcs, raylet, agents, driver, workers, dashboard
    assert [door for door in sorted(seen.doors) if not door.is_local] == []


def test_no_door_does_anything_for_another_machine(seen: Seen) -> None:
    assert [f"{door}: {tried.speaks}, {dict(tried.did)}" for door, tried in seen.from_outside.items()] == []


@pytest.mark.parametrize("token", ["none", "wrong"])
def test_no_door_lists_submits_reads_or_stops_without_the_token(seen: Seen, token: str) -> None:
    done = {f"{door.port} {door.who}": by[token].did for door, by in seen.here.items()}
    assert [f"{door}: {dict(did)}" for door, did in done.items() if did] == []


def test_the_token_opens_them(seen: Seen) -> None:
    """Else the tests above would pass for doors that they do not find."""
    opened = {what for by in seen.here.values() for what in by["right"].did}
    assert {
        "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
        "/ray.rpc.NodeManagerService/GetNodeStats",
        "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
        "/ray.rpc.ReporterService/HealthCheck",
        "GET /api/jobs/",
        "POST /get_runtime_envs_info",
    } <= opened


def test_nobody_else_can_read_the_token(seen: Seen) -> None:
    assert len(seen.token) == 64
    assert seen.token != WRONG
    assert sorted(seen.modes.values()) == [0o600, 0o700]
    secret = seen.token.encode()
    assert [name for name, content in seen.files.items() if secret in content] == []
    assert [line for line in seen.commands.values() if seen.token in line] == []
    assert [pid for pid, content in seen.environments.items() if secret in content] == []
    assert seen.token not in seen.output


def test_rays_folder_goes_with_the_run(seen: Seen) -> None:
    assert seen.code == 75
    assert not seen.left


def test_nobody_joins_it_by_looking_for_a_cluster(seen: Seen) -> None:
    train, jobs = seen.joining.values()
    assert (train.returncode, jobs.returncode) == (4, 7), train.stderr + jobs.stderr
    for command in (train, jobs):
        assert "no Ray cluster has a node on this machine" in command.stderr


def test_ray_writes_down_no_secret_of_the_users(seen: Seen) -> None:
    assert any(name.endswith("runtime_env_agent.log") for name in seen.files)
    assert [name for name, content in seen.files.items() if HF.encode() in content] == []
    assert [line for line in seen.commands.values() if HF in line] == []
