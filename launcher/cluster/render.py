"""Manifests of a run for the scheduler of a cluster: KubeRay's RayJob and RayCluster, and an sbatch script.

What they hold comes from the run file and a few options. They carry the run file with them, with the overrides and
variables that it was rendered with, so a manifest is all that a cluster must be given. Nothing is sent anywhere.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_dist.config import Dumper, Tree, yaml_text
from cl_dist.errors import ConfigError, require
from cl_dist.run_config import ClusterConfig, RunConfig, read_run_file
from launcher import console, runs
from launcher.options import Config, Overrides

app = typer.Typer(no_args_is_help=True, help="Write manifests for KubeRay or Slurm from a run file.")
SHARED = "/mnt/cl-dist"
"""Where pods see the volume that they share, and what relative paths of a run file start from in them."""
RUN_FILE = "/etc/cl-dist/run.yaml"
TOKEN = "cl-dist-token"
"""The Secret that holds Ray's token; KubeRay wants it under the key auth_token."""
MAX_NAME = 47
"""KubeRay refuses longer names of RayJobs: it makes names of services from them."""
MAX_RUN_FILE = 1_000_000
"""Bytes; a ConfigMap holds 1 MiB."""
MARGIN_S = 60
"""What a stop may take beyond the saving of the stage: Ray shuts down, the report is left out."""
# The SIGTERM that ends a pod goes to the container's first process, which does not pass it on to the driver. The
# brackets in the pattern keep it from finding this very command.
STOP_DRIVER = r"""drivers() { for p in /proc/[0-9]*; do
  if tr '\0' ' ' <"$p/cmdline" 2>/dev/null | grep -qE '/[c]l-dist @WHICH@ '; then echo "${p#/proc/}"; fi
done; }
for pid in $(drivers); do kill -TERM "$pid"; done
while [ -n "$(drivers)" ]; do sleep 1; done
"""

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="write a file there instead of stdout")]
PerNode = Annotated[int, typer.Option(min=1, help="workers that share a pod or node")]


@dataclass(frozen=True, slots=True)
class Nodes:
    """How many nodes of which size hold the gang."""

    count: int
    fewest: int
    """With fewer of them the run cannot go on."""
    cpus: int
    gpus: int


def nodes_of(cluster: ClusterConfig, workers_per_node: int) -> Nodes:
    """Return the nodes that a run needs when so many of its workers share one.

    Raises:
        ConfigError: If the run does not use Ray, so that no cluster would help it.
    """
    require(cluster.dispatcher == "ray", "cluster.dispatcher", cluster.dispatcher, "'ray' for a run on a cluster")
    require(cluster.address is None, "cluster.address", cluster.address, "nothing: the manifest starts its own Ray")
    each = min(workers_per_node, cluster.workers)
    return Nodes(
        count=math.ceil(cluster.workers / each),
        fewest=math.ceil((cluster.min_workers or cluster.workers) / each),
        cpus=math.ceil(each * cluster.cpus_per_worker),
        gpus=math.ceil(each * cluster.gpus_per_worker),
    )


def notice_s(cluster: ClusterConfig) -> int:
    """Return how long before its end a run must be told to stop."""
    return math.ceil(cluster.stop_timeout_s) + MARGIN_S


def run_text(config: RunConfig) -> str:
    """Return the run file that goes into a manifest."""
    return yaml_text(config.tree(), width=120)


def name_of(config: RunConfig) -> str:
    """Return the run's name as Kubernetes allows it.

    Raises:
        ConfigError: If it is too long.
    """
    name = "cl-dist-" + re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")
    require(len(name) <= MAX_NAME, "run.name", config.run.name, f"at most {MAX_NAME - len('cl-dist-')} characters")
    return name


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What the run file does not say about pods."""

    image: str
    claim: str
    memory_gib: int
    shm_gib: int


def ray_job(config: RunConfig, workers_per_node: int, options: PodOptions) -> list[Tree]:
    """Return the objects of a Ray cluster that lives for one run: a ConfigMap and a RayJob."""
    name = name_of(config)
    spec = {
        "entrypoint": f"cl-dist train {RUN_FILE} cluster.address=auto",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        # A new cluster for each try; `train` skips what the run folder holds.
        "backoffLimit": config.cluster.max_failures,
        "rayClusterSpec": _cluster_spec(config, workers_per_node, options, f"train {RUN_FILE}"),
    }
    return [_config_map(config), _object("ray.io/v1", "RayJob", name, {"spec": spec})]


def ray_cluster(config: RunConfig, workers_per_node: int, options: PodOptions) -> list[Tree]:
    """Return the objects of a standing Ray cluster of the run's size: a ConfigMap and a RayCluster."""
    spec = _cluster_spec(config, workers_per_node, options, "(train|resume)")
    return [_config_map(config), _object("ray.io/v1", "RayCluster", name_of(config), {"spec": spec})]


def _object(api: str, kind: str, name: str, rest: Tree) -> Tree:
    labels = {"app.kubernetes.io/name": "cl-dist", "app.kubernetes.io/instance": name}
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": labels}, **rest}


def _config_map(config: RunConfig) -> Tree:
    text = run_text(config)
    size = len(text.encode())
    if size > MAX_RUN_FILE:
        raise ConfigError(f"the run file has {size:,} bytes: expected at most {MAX_RUN_FILE:,}, what a ConfigMap holds")
    return _object("v1", "ConfigMap", f"{name_of(config)}-run", {"data": {"run.yaml": text}})


def _cluster_spec(config: RunConfig, workers_per_node: int, options: PodOptions, drivers: str) -> Tree:
    """Return head and workers; drivers are the commands that are told to stop, and waited for, before the head goes."""
    nodes = nodes_of(config.cluster, workers_per_node)
    wait = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(notice_s(config.cluster))}
    head = _pod(config, "head", {"cpu": "2", "memory": f"{options.memory_gib}Gi"}, options)
    (container,) = head["spec"]["containers"]
    container["env"].append(wait)  # else Ray kills a job 3 s after it told it to stop
    stop = STOP_DRIVER.replace("@WHICH@", drivers)
    container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", stop]}}}
    container["ports"] = [
        {"containerPort": 6379, "name": "gcs"},
        {"containerPort": 8265, "name": "dashboard"},
    ]
    size = {"cpu": str(nodes.cpus), "memory": f"{options.memory_gib}Gi"}
    if nodes.gpus:
        size["nvidia.com/gpu"] = str(nodes.gpus)
    workers = {
        "groupName": "workers",
        "replicas": nodes.count,
        "minReplicas": nodes.fewest,
        "maxReplicas": nodes.count,
        "rayStartParams": {},
        "template": _pod(config, "worker", size, options),
    }
    return {
        "rayVersion": version("ray"),  # KubeRay refuses tokens without it
        "authOptions": {"mode": "token", "secretName": TOKEN},  # for KubeRay's own calls and its submitter
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},  # the driver alone
        "workerGroupSpecs": [workers],
    }


def _pod(config: RunConfig, name: str, size: Mapping[str, str], options: PodOptions) -> Tree:
    """Return a pod of the cluster; what it requests is also its limit, so that none is evicted for another's sake."""
    place = config.run.dir if Path(config.run.dir).is_absolute() else SHARED
    token = {"secretKeyRef": {"name": TOKEN, "key": "auth_token"}}
    container = {
        "name": f"ray-{name}",
        "image": options.image,
        "workingDir": place,
        "env": [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "HF_HOME", "value": f"{place}/huggingface"},
        ],
        "resources": {"requests": dict(size), "limits": dict(size)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "shared", "mountPath": place},
            {"name": "run-file", "mountPath": str(Path(RUN_FILE).parent), "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "run-file", "configMap": {"name": f"{name_of(config)}-run"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shm_gib}Gi"}},
    ]
    spec = {
        "restartPolicy": "Never",  # KubeRay makes a fresh pod instead
        "terminationGracePeriodSeconds": notice_s(config.cluster) + MARGIN_S,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": {"app.kubernetes.io/name": "cl-dist"}}, "spec": spec}


class _Dumper(Dumper):
    """YAML as people write it: texts of several lines as blocks, no references."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts twice."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def kuberay_text(objects: list[Tree], claim: str) -> str:
    """Return the objects as one YAML stream, with what must be there before them."""
    head = (
        "# Made by `cl-dist render kuberay`; the run file is in it. KubeRay 1.6 or newer. Once in its namespace:\n"
        f'#   kubectl create secret generic {TOKEN} --from-literal=auth_token="$(openssl rand -hex 32)"\n'
        f"#   a PersistentVolumeClaim {claim} that many nodes can write (ReadWriteMany), with models and data on it\n"
    )
    return head + "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120) for each in objects)


def slurm_text(config: RunConfig, workers_per_node: int) -> str:
    """Return an sbatch script that starts Ray on its nodes, trains, and requeues itself when it was told to stop."""
    templates = Environment(
        loader=PackageLoader("launcher"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash has {# in ${#array}
    )
    return templates.get_template("slurm.sh.j2").render(
        name=config.run.name,
        nodes=nodes_of(config.cluster, workers_per_node),
        notice_s=notice_s(config.cluster),
        start_s=math.ceil(config.cluster.start_timeout_s),
        run_file=run_text(config),
    )


def _give(text: str, out: Path | None, name: str) -> None:
    if out is None:
        console.write(text, utf8=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text, encoding="utf8")
    console.out.print(str(out / name), soft_wrap=True)


@app.command()
def kuberay(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    kind: Annotated[
        Literal["job", "cluster"],
        typer.Option(help="job: a Ray cluster for this run alone; cluster: a standing one of its size"),
    ] = "job",
    image: Annotated[str, typer.Option(help="image of every pod; cl-dist:gpu or cl-dist:cpu if left out")] = "",
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim that all pods share")] = "cl-dist",
    memory_gib: Annotated[int, typer.Option(min=2, help="memory of a pod, shared memory included")] = 32,
    shm_gib: Annotated[int, typer.Option(min=1, help="shared memory of a pod, for Ray's object store")] = 8,
    workers_per_node: PerNode = 1,
) -> None:
    """Write a RayJob (or RayCluster) of the run, with its run file as ConfigMap."""
    run = read_run_file(runs.run_file(config), overrides or [])
    if shm_gib >= memory_gib:
        raise ConfigError(f"--shm-gib {shm_gib}: expected less than --memory-gib {memory_gib}, of which it is a part")
    options = PodOptions(
        image or ("cl-dist:gpu" if run.cluster.gpus_per_worker else "cl-dist:cpu"), claim, memory_gib, shm_gib
    )
    objects = (ray_job if kind == "job" else ray_cluster)(run, workers_per_node, options)
    _give(kuberay_text(objects, claim), out, f"{run.run.name}.ray{kind}.yaml")


@app.command()
def slurm(config: Config, overrides: Overrides = None, out: Out = None, workers_per_node: PerNode = 1) -> None:
    """Write an sbatch script of the run, with its run file in it; queue, memory and time are sbatch's own options."""
    run = read_run_file(runs.run_file(config), overrides or [])
    _give(slurm_text(run, workers_per_node), out, f"{run.run.name}.sbatch")
