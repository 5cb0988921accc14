"""Strict readers of what lies in cluster_configs: each raises RefusedError where the system it is for would."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from packaging.version import Version

from cl_dist.config import Tree

KUBERNETES = "1.32"
POD = {"kind": "Pod", "apiVersion": "v1"}
# The fields of ray.io/v1 in KubeRay 1.6.2, less those for autoscaling, Redis and ingress, which we do not use. Source:
# its API reference and CRDs; `test_our_account_of_kuberay_is_that_of_its_crds` compares.
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE = {"type": "object", "required": ["spec"]}
RAY_CLUSTER: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["headGroupSpec"],
    "properties": {
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}},
        },
        "rayVersion": {"type": "string"},
        "suspend": {"type": "boolean"},
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template"],
            "properties": {"labels": LABELS, "rayStartParams": LABELS, "resources": LABELS, "template": TEMPLATE},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "maxReplicas", "minReplicas", "template"],
                "properties": {
                    "groupName": {"type": "string"},
                    "idleTimeoutSeconds": {"type": "integer"},
                    "labels": LABELS,
                    "maxReplicas": {"type": "integer"},
                    "minReplicas": {"type": "integer"},
                    "numOfHosts": {"type": "integer"},
                    "rayStartParams": LABELS,
                    "replicas": {"type": "integer"},
                    "resources": LABELS,
                    "suspend": {"type": "boolean"},
                    "template": TEMPLATE,
                },
            },
        },
    },
}
RAY_JOB: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["entrypoint", "rayClusterSpec"],  # for a job with a cluster of its own
    "properties": {
        "activeDeadlineSeconds": {"type": "integer"},
        "backoffLimit": {"type": "integer"},
        "entrypoint": {"type": "string"},
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "jobId": {"type": "string"},
        "preRunningDeadlineSeconds": {"type": "integer"},
        "rayClusterSpec": RAY_CLUSTER,
        "runtimeEnvYAML": {"type": "string"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "suspend": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
    },
}
SPECS: Mapping[str, Mapping[str, Any]] = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}
LONGEST = {"RayCluster": 53, "RayJob": 47}
SBATCH = {  # options of sbatch(1) that our script uses, and what may follow
    "cpus-per-task": r"[1-9]\d*",
    "gpus-per-node": r"[1-9]\d*",
    "job-name": r"\S+",
    "nodes": r"[1-9]\d*(-[1-9]\d*)?",
    "ntasks-per-node": r"1",
    "open-mode": r"append",
    "output": r"\S+",
    "requeue": "",
    "signal": r"B:TERM@[1-9]\d*",
    "time": r"(\d+-)?\d\d?:\d\d:\d\d",
}


class RefusedError(Exception):
    """What a system would say of a file that it cannot use."""


def check_kuberay(text: str) -> list[Tree]:
    """Return the objects of a stream of YAML for Kubernetes."""
    objects: list[Tree] = [each for each in yaml.safe_load_all(text) if each is not None]
    for each in objects:
        if not each.get("apiVersion", "").startswith("ray.io/"):
            _kubernetes(each)
            continue
        kind, fields = str(each.get("kind")), {"apiVersion", "kind", "metadata", "spec"}
        if each["apiVersion"] != "ray.io/v1" or kind not in SPECS or set(each) != fields:
            raise RefusedError(f"{each['apiVersion']} {kind} with {sorted(each)}")
        _kubernetes({**POD, "metadata": each["metadata"]})
        name = each["metadata"]["name"]
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > LONGEST[kind]:
            raise RefusedError(f"metadata.name={name}")
        check_schema(each["spec"], SPECS[kind])
        cluster = each["spec"].get("rayClusterSpec", each["spec"])
        if cluster.get("authOptions", {}).get("mode") == "token" and Version(cluster["rayVersion"]) < Version("2.52"):
            raise RefusedError("tokens need Ray 2.52")
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            _kubernetes({**POD, **group["template"]})
            _mounts(group["template"]["spec"], objects)
    return objects


def _kubernetes(thing: Mapping[str, Any]) -> None:
    try:
        kubernetes_validate.validate(dict(thing), KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        raise RefusedError(error.message) from None


def _mounts(pod: Mapping[str, Any], objects: list[Tree]) -> None:
    """Refuse what the API server would: mounts of no volume; and ConfigMaps that the stream does not bring along."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    maps = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            if mount["name"] not in volumes:
                raise RefusedError(f"volumeMounts: {mount['name']} is no volume")
    for volume in volumes.values():
        if (name := volume.get("configMap", {}).get("name")) is not None and name not in maps:
            raise RefusedError(f"volumes: there is no ConfigMap {name}")


def check_schema(tree: Any, schema: Mapping[str, Any]) -> None:
    """Refuse what a JSON Schema does not describe."""
    try:
        jsonschema.validate(tree, schema)
    except jsonschema.ValidationError as error:
        raise RefusedError(f"{error.json_path}: {error.message}") from None


def check_launcher(text: str) -> Tree:
    """Return the configuration that `ray up` makes of its file, as far as it goes without asking a cloud."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = yaml.safe_load(text)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf8"))
    unknown = set(tree["provider"]) - set(schema["properties"]["provider"]["properties"])
    if unknown:  # Ray would ignore them
        raise RefusedError(f"provider: {unknown}")
    try:
        config = prepare_config(tree)
        validate_config(config)
    except (jsonschema.ValidationError, ValueError, KeyError) as error:
        raise RefusedError(str(error)) from None
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        check_ray_start(command)
    return config


def check_ray_start(command: str) -> None:
    """Refuse a `ray start` with options that this Ray does not have."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    if unknown := set(re.findall(r"(?<= )--[a-z-]+", command)) - known:
        raise RefusedError(f"ray start: {unknown}")


def check_sbatch(path: Path) -> dict[str, str]:
    """Return the options that an sbatch script sets in its head."""
    for command in (["bash", "-n", str(path)], ["shellcheck", "--severity=info", str(path)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RefusedError(done.stdout + done.stderr)
    lines = path.read_text(encoding="utf8").splitlines()
    options: dict[str, str] = {}
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line)
            name, value = (found[1], found[2] or "") if found else ("", "")
            if name not in SBATCH or not re.fullmatch(SBATCH[name], value):
                raise RefusedError(line)
            options[name] = value
    if lines[0] != "#!/bin/bash" or sum(line.startswith("#SBATCH") for line in lines) != len(options):
        raise RefusedError("the options must come first, each once: sbatch stops reading at the first command")
    for line in lines:
        check_ray_start(line.partition("ray start")[2] or line.partition('"$node')[2])
    return options


def check_deepspeed(text: str) -> Tree:
    """Return a configuration that DeepSpeed has read."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    tree: Tree = json.loads(text)
    unknown = set(tree) - {  # DeepSpeed ignores what it does not know at the top
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "bf16",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
    if unknown:
        raise RefusedError(f"{unknown}")
    try:
        DeepSpeedConfig(json.loads(text))
    except (ValidationError, AssertionError, ValueError) as error:
        raise RefusedError(str(error)) from None
    return tree


def strict(schema: Any) -> Any:
    """Return a CRD's schema with unknown fields refused, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if "type" in schema and isinstance(schema.get("properties"), dict):  # and not a field of the name `properties`
        result.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return result


def crd(folder: Path, kind: str) -> Tree:
    """Return the schema of a kind's spec, from the folder of KubeRay's CRDs."""
    text = (folder / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf8")
    tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # a megabyte
    (found,) = (each for each in tree["spec"]["versions"] if each["name"] == "v1")
    return strict(found["schema"]["openAPIV3Schema"]["properties"]["spec"])


def differences(ours: Any, theirs: Any, where: str = "spec") -> Iterator[str]:
    """Yield where our account of a schema has a field that the schema has not, or one of another kind."""
    for name, field in ours.get("properties", {}).items():
        other = theirs.get("properties", {}).get(name)
        if other is None or ("type" in field and field["type"] != other.get("type")):
            yield f"{where}.{name}"
        elif "items" in field:
            yield from differences(field["items"], other["items"], f"{where}.{name}[]")
        elif field is not TEMPLATE:
            yield from differences(field, other, f"{where}.{name}")
    if not set(theirs.get("required", [])) <= set(ours.get("required", [])):
        yield f"{where}: requires {theirs['required']}"
