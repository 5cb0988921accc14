"""What stays the same when code is rearranged: the fingerprints of all recipes, and a tiny run of every method.

The fingerprints hold on any machine. The bytes of the tiny runs hold on one kind of processor and one release of torch:
elsewhere their scores are compared.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cl_dist.contract import tiny
from cl_dist.run import Run
from cl_dist.run_config import read_run_file
from cl_dist.stage import Stage, StageRef, digest_of, ref
from launcher.runs import recipes

HERE = Path(__file__).parent
FINGERPRINTS, RESULTS = HERE / "fingerprints.json", HERE / "results.json"
RENAMED: Mapping[str, str] = {
    "output": "answers",
    "require_known_label": "known_labels",
    "require_known_question": "known_question",
    "parallel_samples": "slots",
    "kv_cache_gb": "cache_gb",
    "max_grad_norm": "clip",
    "warmup_ratio": "warmup",
    "keep": "select",
    "role": "step",
    "trial": "number",
    "attention_scope": "rows",
    "max_examples": "samples",
    "voting_tasks": "voters",
}
"""New name of a setting -> the name that it had when the golden files were written."""
RENAMED_VALUES: Mapping[str, Mapping[Any, Any]] = {"model.output": {"classifier": "class", "lm": "text"}}
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "rational-lamol-movies-boolq-scifact": (
        "science.tasks.0.source.split.names={test: train, dev: test}",
        "science.tasks.0.source.split.dev=0",
    )
}
"""Settings without which a recipe does not read the data that is public."""
RUNS: Mapping[str, Mapping[str, Any]] = {
    **tiny.METHODS,
    "invrat": {**tiny.METHODS["rational_lamol"], "rationales": "invrat", "invrat": {"restarts": 2}},
    "brute_force": {
        **tiny.METHODS["rational_lamol"],
        "freeze": "brute_force",
        "level": "block",
        "frozen_units": [[0, 0], [1, 0]],
    },
    "low_rank": {**tiny.METHODS["lamol"], "lora": {"r": 2}},
    "distilled": {**tiny.METHODS["lamol"], "distill": 0.5},
}
"""Methods with their settings: each one, and variants with more kinds of stages or learners."""
SCIENCE: Mapping[str, Any] = {"train": {"epochs": 1, "min_round_steps": 2, "weight_decay": 0.05, "max_grad_norm": 0.5}}


def needs(recipe: str) -> list[str]:
    """Return what a recipe reads and this machine lacks: environment variables and packages."""
    text = recipes()[recipe].read_text()
    for base in re.findall(r"^extends: *(\S+)\.yaml", text, re.M):
        text += recipes()[base].read_text()
    variables = {name for name in re.findall(r"\$\{env:(\w+)", text) if name not in os.environ}
    packages = {name for name in re.findall(r"package:(\w+)", text) if find_spec(name) is None}
    return sorted(variables | packages)


def readable() -> list[str]:
    """Return the recipes whose data is there."""
    return [name for name in recipes() if not needs(name)]


def fingerprints(recipe: str) -> dict[str, str]:
    """Return the fingerprint of every stage of a recipe and of its baselines, by 'run/task/stage'."""
    config = read_run_file(recipes()[recipe], list(SETTINGS.get(recipe, ())))
    return {
        f"{name}/{opened.ledger.key(stage_ref)}": found
        for name, run in {"main": config, **{b: config.baseline(b) for b in config.baselines}}.items()
        for opened in [Run(run)]
        for stage_ref, found in _fingerprints(opened).items()
    }


def _fingerprints(opened: Run) -> dict[StageRef, str]:
    @cache
    def old(task: int, name: str) -> str:
        stage: Stage = opened.stage(next(ref(s) for s in opened.plan(task) if s.name == name))
        facts = {
            _old_name(key): _old_value(key, value)
            for key, value in opened.facts(stage).items()
            if not key.startswith("inputs.")
        }
        facts |= {f"inputs.{opened.ledger.key(r)}": old(r.task, r.stage) for r in stage.inputs}
        return digest_of(facts)

    return {ref(s): old(s.task, s.name) for t in range(len(opened.tasks)) for s in opened.plan(t)}


def _old_name(key: str) -> str:
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def _old_value(key: str, value: Any) -> Any:
    return RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def machine() -> str:
    """Return what decides the bytes of a float32 computation."""
    flags = Path("/proc/cpuinfo")
    model = next((line for line in flags.read_text().splitlines() if line.startswith("model name")), "")
    return f"{platform.machine()} {model.partition(':')[2].strip()} torch {torch.__version__}"


def results(folder: Path) -> dict[str, Any]:
    """Return the digests of what a tiny run of every method leaves behind, and its scores."""
    return {"machine": machine(), "runs": {name: result(folder, name) for name in RUNS}}


def result(folder: Path, name: str) -> dict[str, Any]:
    """Return the digests and scores of one tiny run."""
    settings = RUNS[name]
    train = {**SCIENCE["train"], **({"epochs": 4, "lr": 0.01} if tiny.writes(settings["name"]) else {})}
    over = {"run": {"name": name}, "science": {"method": dict(settings), "train": train}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float32 sums depends on it
    try:
        opened = tiny.compute(tiny.make_run(folder, over))
    finally:
        torch.set_num_threads(threads)
    found = sorted(
        p
        for p in opened.config.folder.rglob("*")
        if p.suffix in (".safetensors", ".csv") or p.name in ("scores.json", "samples.jsonl")
    )
    return {
        "bytes": {str(p.relative_to(opened.config.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found},
        "scores": {
            str(p.relative_to(opened.config.folder)): json.loads(p.read_text())
            for p in found
            if p.name == "scores.json"
        },
    }


def save(path: Path, data: Any) -> None:
    """Write a golden file."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
