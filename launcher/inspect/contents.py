"""Contents and integrity of a run folder, a stage folder or a .safetensors file, read without torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from cl_dist.config import Tree
from cl_dist.errors import CheckpointError, ConfigError, DataError
from cl_dist.ledger import MANIFEST, parse_manifest, sha256
from cl_dist.models.config import ModelConfig
from cl_dist.paths import resolve
from cl_dist.run_config import ClusterConfig, RunConfig
from cl_dist.run_folder import reopen
from launcher.inspect.tensors import BITS, Stored, groups, masks, read_header, read_weights

LEARNER, FACTS = "learner.safetensors", "train.json"
OK = "OK"


def inspect_path(path: Path) -> Tree:
    """Return the contents of a path as plain data; `faults` has a line for each damage.

    Raises:
        ConfigError: If cl-dist does not write such a file or folder.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return _file(path)
    if (path / MANIFEST).is_file():
        return _stage(path)
    if (path / "config.yaml").is_file():
        return _run(path)
    raise ConfigError(
        f"PATH={str(path)!r}: expected a run folder (with config.yaml in it), a finished stage's folder "
        f"(with {MANIFEST}), or a .safetensors file"
    )


def _file(path: Path) -> Tree:
    """Describe a .safetensors file; its digest comes from a manifest in the same folder, if any."""
    document: Tree = {"what": "tensors", "path": str(path), "bytes": path.stat().st_size, "state": OK, "faults": []}
    manifest, _ = _manifest(path.parent)
    known = manifest["files"].get(path.name) if manifest else None
    document["digest"] = "unknown" if known is None else OK if sha256(path) == known else "damaged"
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        return document | {"state": "damaged", "faults": [str(error)], "groups": [], "masks": None}
    if document["digest"] == "damaged":
        document |= {"state": "damaged", "faults": [f"{path}: damaged: its digest differs from the manifest's"]}
    return document | {"groups": groups(tensors), "masks": masks(tensors, None)}


def _stage(folder: Path) -> Tree:
    """Describe a stage's folder."""
    document = _manifested(folder)
    tensors: dict[str, dict[str, Stored]] = {}
    if document["kind"] is not None and document["state"] == OK:
        files = [file["name"] for file in document["files"] if file["name"].endswith(".safetensors")]
        tensors = {name: read_header(folder / name) for name in files if not name.startswith("trainable")}
        if document["kind"] == "train":
            tensors["trainable"] = read_weights(folder)
    run = folder.resolve().parents[2]
    config = reopen(run) if (run / "config.yaml").is_file() else None
    document["tensors"] = {name: groups(found) for name, found in tensors.items()}
    document["masks"] = masks(tensors.get(LEARNER, {}), _facts(folder))
    document["plugins"] = None
    if config is not None and "trainable" in tensors:
        document["plugins"] = plugins(tensors["trainable"], config.science.model, config.cluster)
    return document


def _run(folder: Path) -> Tree:
    """Describe a run's folder: its stages, and the model after the last finished Train stage."""
    config: RunConfig = reopen(folder)
    begun = _begun(folder / "stages")
    finished = [path for path in begun if (path / MANIFEST).is_file()]
    stages = {f"{path.parent.name}/{path.name}": _manifested(path) for path in finished}
    faults = [fault for stage in stages.values() for fault in stage["faults"]]
    for key, stage in stages.items():
        for name, fingerprint in stage["inputs"].items():
            if name not in stages:
                faults.append(f"{folder / 'stages' / key}: was made from {name}, which is missing")
            elif stages[name]["fingerprint"] != fingerprint:
                faults.append(f"{folder / 'stages' / key}: was made from a different {name}")
    others = [path for path in begun if path not in finished]
    document: Tree = {
        "what": "run",
        "path": str(folder),
        "run": config.run.name,
        "method": config.science.method.name,
        "workers": config.cluster.workers,
        "zero_stage": config.cluster.zero_stage,
        "state": "damaged" if faults else OK,
        "faults": faults,
        "bytes": sum(file["bytes"] or 0 for stage in stages.values() for file in stage["files"]),
        "stages": list(stages.values()),
        "unfinished": [str(path.relative_to(folder / "stages")) for path in others],
        "baselines": sorted(path.parent.name for path in (folder / "baselines").glob("*/config.yaml")),
        "model": None,
        "groups": [],
        "plugins": None,
        "masks": None,
    }
    trained = [key for key, stage in stages.items() if stage["kind"] == "train"]
    if not trained or faults:
        return document
    last = max(trained, key=lambda key: int(key.partition("-")[0]))
    tensors: dict[str, Stored] = {}
    for key in reversed(_chain(folder / "stages", last)):
        tensors |= read_weights(folder / "stages" / key)
    learner = folder / "stages" / last / LEARNER
    return document | {
        "model": last,
        "groups": groups(tensors),
        "plugins": plugins(tensors, config.science.model, config.cluster),
        "masks": masks(read_header(learner), _facts(learner.parent)) if learner.exists() else None,
    }


def _begun(stages: Path) -> list[Path]:
    """Return the folders of stages; unlike a glob, this fails for a folder without read permission."""
    tasks = [path for path in stages.iterdir() if path.is_dir()] if stages.is_dir() else []
    return sorted(path for task in tasks for path in task.iterdir() if path.is_dir())


def _chain(stages: Path, key: str) -> list[str]:
    """Return the Train stages whose weights make up a model, newest first, from their manifests."""
    chain = [key]
    while init := json.loads((stages / chain[-1] / MANIFEST).read_text(encoding="utf8"))["stage"].get("init"):
        (folder,) = (path for path in stages.glob(f"{init['task']:02d}-*") if (path / init["stage"]).is_dir())
        chain.append(f"{folder.name}/{init['stage']}")
    return chain


def _manifest(folder: Path) -> tuple[Tree | None, str]:
    """Return the manifest of a stage's folder, or None and the reason."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_text(encoding="utf8")), ""
    except FileNotFoundError:
        return None, f"{path}: no such file"
    except ValueError as error:
        return None, f"{path}: damaged: {error}; remove the folder {folder} to compute the stage again"


def _manifested(folder: Path) -> Tree:
    """Describe a stage by its manifest, and compare its files with the digests there."""
    manifest, fault = _manifest(folder)
    faults = [fault] if fault else []
    document: Tree = {"what": "stage", "path": str(folder), "stage": f"{folder.parent.name}/{folder.name}"}
    if manifest is None:
        empty: Tree = {"kind": None, "fingerprint": None, "started": None, "seconds": None, "inputs": {}, "files": []}
        return document | empty | {"state": "damaged", "faults": faults}
    files = []
    for name, digest in manifest["files"].items():
        path = folder / name
        state = "missing" if not path.is_file() else OK if sha256(path) == digest else "damaged"
        files.append({"name": name, "bytes": path.stat().st_size if path.is_file() else None, "state": state})
        if state != OK:
            faults.append(f"{path}: {state}; remove the folder {folder} and resume to compute the stage again")
    facts: Tree = manifest["facts"]
    return document | {
        "kind": manifest["stage"]["kind"],
        "fingerprint": manifest["fingerprint"],
        "started": manifest["started"],
        "seconds": manifest["seconds"],
        "inputs": {k.removeprefix("inputs."): digest for k, digest in facts.items() if k.startswith("inputs.")},
        "files": files,
        "state": "damaged" if faults else OK,
        "faults": faults,
    }


def _facts(folder: Path) -> Tree | None:
    """Return the learner's own part of train.json; None if it cannot be read."""
    try:
        learner: Tree = json.loads((folder / FACTS).read_text(encoding="utf8"))["learner"]
    except (OSError, ValueError, KeyError):
        return None
    return learner


def plugins(tensors: Mapping[str, Stored], model: ModelConfig, cluster: ClusterConfig) -> Tree | None:
    """Return the size of the tensors that the method adds to the backbone; None if it adds none.

    Under ZeRO-3 a rank has its share of every tensor, rounded up to whole elements; otherwise it has all of them.
    """
    backbone = _backbone_names(model)
    if backbone is None:
        where = f"the backbone {model.source!r} is not on this machine"
        return {"unknown": f"{where}: its tensors cannot be distinguished from those that the method adds"}
    inside = [tensor for name, tensor in tensors.items() if name.startswith("backbone.")]
    own = [tensor for tensor in inside if tensor.name.removeprefix("backbone.") not in backbone]
    if not own:
        return None
    shares = cluster.workers if cluster.zero_stage == 3 else 1
    return {
        "tensors": len(own),
        "elements": sum(tensor.elements for tensor in own),
        "bytes": sum(tensor.size for tensor in own),
        "workers": cluster.workers,
        "zero_stage": cluster.zero_stage,
        "bytes_per_rank": sum(-(-tensor.elements // shares) * BITS[tensor.dtype] // 8 for tensor in own),
    }


def _backbone_names(model: ModelConfig) -> set[str] | None:
    """Return the names of a backbone's tensors, with and without the prefix that some checkpoints have."""
    if model.source.startswith(("package:", ".", "/", "~")) or Path(model.source).is_dir():
        try:
            folder = resolve(model.source)
        except DataError:
            return None
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    names = [name for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)]
    names = [
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)) for name in names
    ]  # names in old checkpoints
    return {*names, *(name.partition(".")[2] for name in names)} or None
