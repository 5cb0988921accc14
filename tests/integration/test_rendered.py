"""What `cl-dist render` writes, run as written on one machine, against a plain `cl-dist train` of the same run file.

The machine stands in for a cluster: every node has a temporary folder and ports of its own, mount points become
folders, and `srun` and `scontrol` are programs that start things here. Entry points, environment, `ray start` and the
script are taken from the manifests.
"""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.config import Tree
from launcher.cluster.render import RUN_FILE, SHARED
from tests.integration import ray_runs
from tests.integration.ray_nodes import free_port
from tests.integration.ray_runs import ROOT, START_S, Process, events, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
CL_DIST = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom launcher.cli import main\nmain()\n"
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
first = next(i for i, arg in enumerate(sys.argv) if i and not arg.startswith("--"))
options = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:first])
tasks = []
def end(*_):
    for task in tasks:
        os.killpg(task.pid, signal.SIGKILL)
signal.signal(signal.SIGTERM, end)
for number in range(int(options["nodes"])):
    if number and "ray" in sys.argv[-1]:
        time.sleep(8)  # nodes of one machine must not start at the same moment
    name = options.get("nodelist", f"node{{number + ('exclude' in options)}}")
    env = {{**os.environ, "SLURMD_NODENAME": name}}
    tasks.append(subprocess.Popen(sys.argv[first:], env=env, start_new_session=True))
for task in tasks:
    task.wait()
"""
SCONTROL = '#!/bin/sh\necho "$@" >>requeued\n'


def programs(folder: Path, **texts: str) -> Path:
    """Write programs into a folder that goes before others on PATH."""
    folder.mkdir()
    for name, text in texts.items():
        path = folder / name.replace("_", "-")
        path.write_text(text, encoding="utf8")
        path.chmod(0o755)
    return folder


def clean(bin_: Path, **env: str) -> dict[str, str]:
    """Return this environment less all that is about Ray, with the programs of a folder first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PATH"] = os.pathsep.join([str(bin_), kept["PATH"]])
    paced = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]}
    return {**kept, **paced, "PYTHONPATH": str(ROOT), **env}


def rendered(folder: Path, name: str, verb: str, out: Path, *options: str) -> Path:
    """Return the manifest of the undisturbed run's file under another name."""
    path = ray_runs.save_run(folder, name)
    args = [sys.executable, "-m", "launcher", "render", verb, str(path), "-o", str(out), *options]
    done = subprocess.run(args, env=ray_runs.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


class Kubernetes:
    """One machine in place of a Kubernetes cluster with KubeRay."""

    def __init__(self, folder: Path, objects: list[Tree], nodes: ExitStack) -> None:
        self.shared, self._etc, self._nodes = folder / "shared", folder / "etc", nodes
        self.shared.mkdir()
        self._etc.mkdir()
        self._bin = programs(folder / "bin", cl_dist=CL_DIST)
        self._folder, self._token = folder, secrets.token_hex(32)
        self._ports = {"port": free_port(), "dashboard-port": free_port()}
        by_kind = {each["kind"]: each for each in objects}
        for name, text in by_kind["ConfigMap"]["data"].items():
            (self._etc / name).write_text(text, encoding="utf8")
        self.job = by_kind["RayJob"]["spec"]
        self.cluster = self.job["rayClusterSpec"]

    def here(self, text: str) -> str:
        """Return a text with paths of the pods replaced by those of this machine."""
        return text.replace(SHARED, str(self.shared)).replace(str(Path(RUN_FILE).parent), str(self._etc))

    def env(self, container: Mapping[str, Any]) -> dict[str, str]:
        secret = {"secretKeyRef": {"name": self.cluster["authOptions"]["secretName"], "key": "auth_token"}}
        values = {}
        for each in container["env"]:
            assert "value" in each or each["valueFrom"] == secret
            values[each["name"]] = self.here(each["value"]) if "value" in each else self._token
        return clean(self._bin, **values)

    def start(self, group: Mapping[str, Any], number: int, head: bool) -> Process:
        """Run what KubeRay makes of rayStartParams and limits; ports and folders keep nodes of one machine apart."""
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        memory = int(limits["memory"].removesuffix("Gi")) << 30
        params = {"block": "true", "num-cpus": limits["cpu"], "memory": str(memory)} | group["rayStartParams"]
        params |= {"temp-dir": f"/tmp/cl-dist-{os.getpid()}-{number}", "node-ip-address": "127.0.0.1"}
        params |= {"metrics-export-port": str(free_port()), "dashboard-agent-listen-port": str(free_port())}
        params |= {"object-store-memory": "100000000"}
        if head:
            params |= {name: str(port) for name, port in self._ports.items()} | {"dashboard-host": "127.0.0.1"}
        else:
            params["address"] = f"127.0.0.1:{self._ports['port']}"
        flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(params.items())]
        command = shlex.join(["ray", "start", *(["--head"] if head else []), *flags])
        node = Process(
            ["bash", "-c", command],
            Path(self.here(container["workingDir"])),
            self.env(container),
            self._folder / f"node{number}.log",
        )
        self._nodes.callback(subprocess.run, ["rm", "-rf", params["temp-dir"]])
        self._nodes.callback(node.close)
        node.has_joined()
        return node

    def start_all(self) -> None:
        """Start the head, then every worker pod."""
        self.start(self.cluster["headGroupSpec"], 0, head=True)
        (group,) = self.cluster["workerGroupSpecs"]
        for number in range(group["replicas"]):
            self.start(group, number + 1, head=False)

    def submit(self, job: str) -> str:
        """Submit the entry point as KubeRay's submitter does, follow its log, and return the job's status."""
        (head,) = self.cluster["headGroupSpec"]["template"]["spec"]["containers"]
        address = f"--address http://127.0.0.1:{self._ports['dashboard-port']}"
        entry = self.here(self.job["entrypoint"])
        command = f"ray job submit {address} --submission-id {job} --no-wait -- {entry} ; "
        command += f"ray job logs {address} --follow {job} ; ray job status {address} {job}"
        done = subprocess.run(
            ["bash", "-c", command],
            env=self.env(head),
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        return done.stdout + done.stderr


def test_a_rayjob_ends_like_a_plain_train(undisturbed: Path, tmp_path: Path) -> None:
    manifest = rendered(undisturbed.parents[1], "rayjob", "kuberay", tmp_path, "--workers-per-node", "2")
    objects = list(yaml.safe_load_all(manifest.read_text(encoding="utf8")))
    with ExitStack() as nodes:
        kubernetes = Kubernetes(tmp_path, objects, nodes)
        kubernetes.start_all()
        output = kubernetes.submit("first")
    assert "succeeded" in output, output
    run = kubernetes.shared / "runs" / "rayjob"
    assert (run / "metrics/R.csv").read_bytes() == (undisturbed / "metrics/R.csv").read_bytes()


@pytest.fixture
def slurm(undisturbed: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An sbatch script in the folder it is submitted from, and the environment that Slurm gives it."""
    bin_ = programs(tmp_path / "bin", cl_dist=CL_DIST, srun=SRUN, scontrol=SCONTROL)
    script = rendered(undisturbed.parents[1], "slurm", "slurm", tmp_path)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "node0"}
    return script, clean(bin_, **job)


def test_a_slurm_job_is_queued_again_and_ends_like_a_plain_train(
    slurm: tuple[Path, dict[str, str]], undisturbed: Path
) -> None:
    script, env = slurm
    run = script.parent / "runs" / "slurm"
    log = script.parent / "slurm.log"
    first = Process(["bash", str(script)], script.parent, env, log)
    try:
        wait_for(lambda: bool(events(run)) or first.process.poll() is not None, START_S, "the run begins")
        first.process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: has it
        assert first.process.wait(START_S) == 75, first.output
    finally:
        first.close()
    requeued = script.parent / "requeued"
    assert requeued.read_text(encoding="utf8") == f"requeue {env['SLURM_JOB_ID']}\n"
    assert json.loads((run / "run.json").read_text(encoding="utf8"))["status"] == "stopped"
    second = Process(["bash", str(script)], script.parent, {**env, "SLURM_RESTART_COUNT": "1"}, log)
    try:
        assert second.process.wait(2 * START_S) == 0, second.output
    finally:
        second.close()
    assert requeued.read_text(encoding="utf8").count("requeue") == 1
    assert (run / "metrics/R.csv").read_bytes() == (undisturbed / "metrics/R.csv").read_bytes()
    assert not list(Path("/tmp").glob(f"cl-dist-{env['SLURM_JOB_ID']}-*"))  # nodes tidy up
