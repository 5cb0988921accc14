"""What `cl-dist render` makes of a run file, how it refuses one, and the hook that tells a driver of its pod's end."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.run_config import RunConfig
from tests.launcher import manifests
from tests.launcher.commands import HEAVY, Cli, fresh, save_run

DRIVER = """import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """A run file for Ray, as plain data."""
    return tiny.tree(tmp_path, {"run": {"dir": "runs"}, "cluster": {"dispatcher": "ray", "engine": "deepspeed"}})


def rendered(cli: Cli, tree: Any, *args: object) -> str:
    path = save_run(Path("given.yaml"), tree)
    verb, *options = args
    ended = cli("render", verb, path, *options)
    assert ended.code == 0, ended.err
    return ended.out


def rayjob(cli: Cli, tree: Any, *args: object) -> tuple[Any, Any]:
    """Return the ConfigMap and the RayJob's spec, strictly read."""
    config_map, job = manifests.check_kuberay(rendered(cli, tree, "kuberay", *args))
    return config_map, job["spec"]


def containers(job: Any) -> tuple[Any, Any]:
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    return head, worker


def test_manifests_carry_the_run_file_that_was_rendered(cli: Cli, tree: Any, tmp_path: Path) -> None:
    override = "science.train.epochs=7"
    config_map, _ = rayjob(cli, tree, override)
    script = tmp_path / "tiny.sbatch"
    script.write_text(rendered(cli, tree, "slurm", override), encoding="utf8")
    manifests.check_sbatch(script)
    carried = script.read_text(encoding="utf8").partition("<<'RUN_FILE'\n")[2].partition("\nRUN_FILE\n")[0]
    tree["science"]["train"]["epochs"] = 7
    expected = parse(RunConfig, tree)
    assert parse(RunConfig, yaml.safe_load(config_map["data"]["run.yaml"])) == expected
    assert parse(RunConfig, yaml.safe_load(carried)) == expected


@pytest.mark.parametrize(
    ("cluster", "per_node", "pods", "fewest", "cpus", "gpus"),
    [
        ({"workers": 4}, 1, 4, 4, "1", None),
        ({"workers": 4, "min_workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 3}, 1, 4, 2, "3", "1"),
        ({"workers": 8, "min_workers": 3, "gpus_per_worker": 1, "cpus_per_worker": 2.5}, 4, 2, 1, "10", "4"),
        ({"workers": 3, "gpus_per_worker": 0.5}, 2, 2, 2, "2", "1"),
        ({"workers": 3, "gpus_per_worker": 0.5}, 3, 1, 1, "3", "2"),
        ({"workers": 2, "gpus_per_worker": 1}, 8, 1, 1, "2", "2"),
    ],
)
def test_nodes_hold_the_gang(
    cluster: Any,
    per_node: int,
    pods: int,
    fewest: int,
    cpus: str,
    gpus: str | None,
    cli: Cli,
    tree: Any,
    tmp_path: Path,
) -> None:
    tree["cluster"] |= cluster
    _, job = rayjob(cli, tree, "--workers-per-node", per_node)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (pods, fewest, pods)
    _, worker = containers(job)
    limits = worker["resources"]["limits"]
    assert (limits["cpu"], limits.get("nvidia.com/gpu")) == (cpus, gpus)
    assert worker["image"] == ("cl-dist:gpu" if gpus else "cl-dist:cpu")
    script = tmp_path / "tiny.sbatch"
    script.write_text(rendered(cli, tree, "slurm", "--workers-per-node", per_node), encoding="utf8")
    options = manifests.check_sbatch(script)
    assert options["nodes"] == (str(pods) if pods == fewest else f"{fewest}-{pods}")
    assert (options["cpus-per-task"], options.get("gpus-per-node")) == (cpus, gpus)


def test_a_stop_has_more_time_than_saving_may_take(cli: Cli, tree: Any, tmp_path: Path) -> None:
    tree["cluster"] |= {"stop_timeout_s": 200.5}
    _, job = rayjob(cli, tree)
    head, _ = containers(job)
    (wait,) = (int(each["value"]) for each in head["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    grace = [
        job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"],
    ]
    assert min(grace) > wait > 200.5
    script = tmp_path / "tiny.sbatch"
    script.write_text(rendered(cli, tree, "slurm"), encoding="utf8")
    assert int(manifests.check_sbatch(script)["signal"].removeprefix("B:TERM@")) == wait


def test_a_failed_job_is_tried_again_as_often_as_a_gang(cli: Cli, tree: Any) -> None:
    tree["cluster"] |= {"max_failures": 5}
    _, job = rayjob(cli, tree)
    assert (job["backoffLimit"], job["shutdownAfterJobFinishes"]) == (5, True)
    assert job["entrypoint"] == "cl-dist train /etc/cl-dist/run.yaml cluster.address=auto"


@pytest.mark.parametrize(("run_dir", "place"), [("runs", "/mnt/cl-dist"), ("/data/runs", "/data/runs")])
def test_the_run_folder_lies_on_the_shared_volume(run_dir: str, place: str, cli: Cli, tree: Any) -> None:
    tree["run"]["dir"] = run_dir
    _, job = rayjob(cli, tree, "--claim", "nfs")
    for container in containers(job):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert container["workingDir"] == place
        assert (mounts[place], mounts["/dev/shm"]) == ("shared", "shm")
    volumes = {each["name"]: each for each in job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "nfs"}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_every_process_of_the_cluster_asks_for_the_token(cli: Cli, tree: Any) -> None:
    _, job = rayjob(cli, tree)
    for container in containers(job):
        env = {each["name"]: each for each in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        options = job["rayClusterSpec"]["authOptions"]
        assert (options["mode"], options["secretName"], "auth_token") == ("token", secret["name"], secret["key"])


def test_a_manifest_holds_no_token(cli: Cli, tree: Any) -> None:
    once, again = (rendered(cli, tree, "slurm") + rendered(cli, tree, "kuberay") for _ in range(2))
    assert once == again


def test_files_are_named_after_the_run(cli: Cli, tree: Any, tmp_path: Path) -> None:
    lines = rendered(cli, tree, "slurm", "-o", "there") + rendered(cli, tree, "kuberay", "-o", "there")
    lines += rendered(cli, tree, "kuberay", "--kind", "cluster", "-o", "there")
    assert lines.split() == ["there/tiny.sbatch", "there/tiny.rayjob.yaml", "there/tiny.raycluster.yaml"]
    assert (tmp_path / "there/tiny.rayjob.yaml").read_text(encoding="utf8") == rendered(cli, tree, "kuberay")


def test_names_are_made_to_fit_kubernetes(cli: Cli, tree: Any) -> None:
    tree["run"]["name"] = "Seed_1.b"
    config_map, _ = rayjob(cli, tree)
    assert config_map["metadata"]["name"] == "cl-dist-seed-1-b-run"


@pytest.mark.parametrize(
    ("section", "settings", "args", "told"),
    [
        ("cluster", {"dispatcher": "local"}, ["kuberay"], "cluster.dispatcher='local'"),
        ("cluster", {"address": "auto"}, ["slurm"], "cluster.address='auto'"),
        ("cluster", {"worker": 2}, ["slurm"], "did you mean 'workers'"),
        ("run", {"name": "a" * 40}, ["kuberay"], "at most 39 characters"),
        ("cluster", {}, ["kuberay", "--shm-gib", "32"], "--shm-gib 32"),
    ],
)
def test_what_cannot_run_is_refused_with_exit_2(
    section: str, settings: Any, args: list[str], told: str, cli: Cli, tree: Any
) -> None:
    tree[section] |= settings
    path = save_run(Path("given.yaml"), tree)
    verb, *options = args
    ended = cli("render", verb, path, *options, "-o", "there")
    assert (ended.code, Path("there").exists()) == (2, False)
    assert told in ended.err


def test_a_run_file_too_large_for_a_config_map_is_refused(cli: Cli, tree: Any) -> None:
    tree["science"]["tasks"][0]["question"] = "why? " * 250_000
    ended = cli("render", "kuberay", save_run(Path("given.yaml"), tree))
    assert ended.code == 2
    assert "ConfigMap" in ended.err


def test_rendering_imports_neither_torch_nor_ray(tree: Any, tmp_path: Path) -> None:
    ended, imported = fresh("render", "kuberay", save_run(tmp_path / "given.yaml", tree), cwd=tmp_path)
    assert (ended.code, set(imported) & set(HEAVY)) == (0, set())


@pytest.mark.parametrize("kind", ["job", "cluster"])
def test_the_hook_tells_the_driver_and_waits_for_its_end(kind: str, cli: Cli, tree: Any, tmp_path: Path) -> None:
    text = rendered(cli, tree, "kuberay", "--kind", kind)
    *_, last = manifests.check_kuberay(text)
    (head,) = last["spec"].get("rayClusterSpec", last["spec"])["headGroupSpec"]["template"]["spec"]["containers"]
    program = tmp_path / "cl-dist"
    program.write_text(DRIVER, encoding="utf8")
    run_file = tmp_path / "run.yaml"
    *shell, hook = head["lifecycle"]["preStop"]["exec"]["command"]
    # Names of its own, so that no other run on this machine is found; `cluster` finds any driver of its pod.
    hook = hook.replace("/[c]l-dist (train|resume)", "/[c]l-dist train /etc/cl-dist/run.yaml")
    hook = hook.replace("/etc/cl-dist/run.yaml", str(run_file))
    args = [sys.executable, str(program), "train"]
    told, other = (
        subprocess.Popen([*args, str(path), "cluster.address=auto"], stdout=subprocess.PIPE)
        for path in (run_file, tmp_path / "other.yaml")
    )
    try:
        for process in (told, other):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        done = subprocess.run([*shell, hook], timeout=60)
        assert (done.returncode, told.poll(), other.poll()) == (0, 75, None)
        assert time.monotonic() - started < 30
    finally:
        for process in (told, other):
            process.kill()
            process.wait()
