"""Manifests for cluster schedulers: KubeRay's RayJob and RayCluster, and an sbatch script for Slurm.

They are made from the run file and a few options. A manifest contains the run file with its overrides and variables
resolved, so a cluster needs nothing else. Rendering sends nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_dist.config import Tree
from cl_dist.errors import ConfigError, require
from cl_dist.run_config import ClusterConfig, RunConfig
from cl_dist.strict_yaml import Dumper, yaml_text

SHARED = "/mnt/cl-dist"
"""Mount point of the pods' shared volume; relative paths of a run file start there."""
RUN_FILE = "/etc/cl-dist/run.yaml"
TOKEN = "cl-dist-token"
"""Name of the Secret with Ray's token; KubeRay expects it under the key auth_token."""
MAX_NAME = 47
"""KubeRay refuses longer names of RayJobs, since it derives service names from them."""
MAX_RUN_FILE = 1_000_000
"""Bytes; a ConfigMap can store 1 MiB."""
MARGIN_S = 60
"""Seconds that a stop may need after the stage is saved, for Ray to shut down."""
# The SIGTERM that ends a pod goes to the container's first process, which does not forward it to the driver. The
# brackets keep the pattern from matching this command itself.
STOP_DRIVER = r"""drivers() { for p in /proc/[0-9]*; do
  if tr '\0' ' ' <"$p/cmdline" 2>/dev/null | grep -qE '/[c]l-dist @WHICH@ '; then echo "${p#/proc/}"; fi
done; }
for pid in $(drivers); do kill -TERM "$pid"; done
while [ -n "$(drivers)" ]; do sleep 1; done
"""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Number and size of the nodes for a gang."""

    count: int
    fewest: int
    """The run stops with fewer nodes."""
    cpus: int
    gpus: int


def nodes_of(cluster: ClusterConfig, workers_per_node: int) -> Nodes:
    """Return the nodes that a run needs with a number of workers on each.

    Raises:
        ConfigError: If the run does not use Ray, or joins an existing cluster.
    """
    require(cluster.dispatcher == "ray", "cluster.dispatcher", cluster.dispatcher, "'ray' for a run on a cluster")
    require(cluster.address is None, "cluster.address", cluster.address, "null: the manifest starts its own Ray")
    each = min(workers_per_node, cluster.workers)
    return Nodes(
        count=math.ceil(cluster.workers / each),
        fewest=math.ceil((cluster.min_workers or cluster.workers) / each),
        cpus=math.ceil(each * cluster.cpus_per_worker),
        gpus=math.ceil(each * cluster.gpus_per_worker),
    )


def notice_s(cluster: ClusterConfig) -> int:
    """Return the seconds between the signal to stop and the end of the allocation."""
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
    """Properties of pods that the run file does not have."""

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
        raise ConfigError(f"the run file has {size:,} bytes: expected at most {MAX_RUN_FILE:,} for a ConfigMap")
    return _object("v1", "ConfigMap", f"{name_of(config)}-run", {"data": {"run.yaml": text}})


def _cluster_spec(config: RunConfig, workers_per_node: int, options: PodOptions, drivers: str) -> Tree:
    """Return head and workers; `drivers` is the pattern of the commands that stop before the head does."""
    nodes = nodes_of(config.cluster, workers_per_node)
    wait = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(notice_s(config.cluster))}
    head = _pod(config, "head", {"cpu": "2", "memory": f"{options.memory_gib}Gi"}, options)
    (container,) = head["spec"]["containers"]
    container["env"].append(wait)  # otherwise Ray kills a job 3 s after its signal to stop
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
    """Return a pod of the cluster; requests equal limits, so that Kubernetes evicts none in favour of another."""
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
    """Writes YAML with blocks for texts of several lines, and without references."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts in full."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def kuberay_text(objects: list[Tree], claim: str) -> str:
    """Return the objects as one YAML stream, with its prerequisites as comments."""
    head = (
        "# Made by `cl-dist render kuberay`; it contains the run file and needs KubeRay 1.6 or newer.\n"
        "# Create once in its namespace:\n"
        f'#   kubectl create secret generic {TOKEN} --from-literal=auth_token="$(openssl rand -hex 32)"\n'
        f"#   a PersistentVolumeClaim {claim} that many nodes can write (ReadWriteMany), with models and data on it\n"
    )
    return head + "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120) for each in objects)


def slurm_text(config: RunConfig, workers_per_node: int) -> str:
    """Return an sbatch script that starts Ray on its nodes, trains, and requeues itself when Slurm stops it early."""
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
