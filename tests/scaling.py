"""Weak and strong scaling of training over worker processes of this machine, and of many GPUs on paper.

`python -m tests.scaling OUT.json` trains one task through Ray with 1, 2 and 4 workers, one thread each, and keeps what
cluster_configs/SCALING.md shows.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from cl_dist.config import merged, parse
from cl_dist.run_config import RunConfig
from launcher.planning import planned
from launcher.scaling import Machine, on_paper, work_of
from tests import tiny
from tests.integration import ray_runs
from tests.integration.ray_runs import Command

WORKERS = (1, 2, 4)
ROWS = 64
"""Of the global batch for strong scaling; for weak scaling half of it for each worker."""
MODEL = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": len(tiny.WORDS),
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B["num_attention_heads"] = 64
PAPER: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], int]] = {
    "lamol, 8B, ZeRO-2": (LLAMA_8B, {"name": "lamol", "gamma": 0.2}, 2),
    "lamol, 8B, ZeRO-3": (LLAMA_8B, {"name": "lamol", "gamma": 0.2}, 3),
    "lamol, 70B, ZeRO-3": (LLAMA_70B, {"name": "lamol", "gamma": 0.2}, 3),
}
TOKENS, BATCH, MICRO = 1024, 256, 4


def measured(folder: Path) -> list[dict[str, Any]]:
    """Return a line for each way of scaling and number of workers."""
    lines = []
    for how in ("strong", "weak"):
        for workers in WORKERS:
            batch = ROWS if how == "strong" else ROWS // 2 * workers
            lines.append({"how": how, "workers": workers, "global_batch": batch} | _run(folder, how, workers, batch))
    return lines


def _run(folder: Path, how: str, workers: int, batch: int) -> dict[str, float]:
    """Train one task and return what its Train stage tells of speed."""
    name = f"{how}-{workers}"
    over = {
        "run": {"name": name},
        "science": {
            "method": {"name": "sequential"},
            "model": {"config": MODEL},
            "train": {"epochs": 4, "global_batch": batch, "select": "last", "lr": 1e-4},
        },
        "cluster": {"workers": workers, "zero_stage": 2, "cpus_per_worker": min(1.0, 2 / workers)},
    }
    tree = tiny.tree(folder, merged(ray_runs.SETTINGS, over), tasks=("food",), train=512)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf8")
    command = Command(folder, "train", f"{name}.yaml")
    if command.end(600.0):
        raise RuntimeError(command.output)
    summary = json.loads((folder / "runs" / name / "metrics" / "summary.json").read_text(encoding="utf8"))
    (stage,) = [stage for stage in summary["stages"] if stage["kind"] == "train"]
    return {name: stage["metrics"][f"perf/{name}"] for name in ("step_s", "tokens_per_s", "startup_s")}


def paper(folder: Path) -> list[dict[str, Any]]:
    """Return a step's costs on 8 to 512 GPUs for some large decoders, from their configs alone."""
    lines = []
    for what, (sizes, method, stage) in PAPER.items():
        science = {
            "model": {"source": str(folder), "config": sizes, "dtype": "bfloat16", "answers": "text"},
            "method": method,
            "train": {"global_batch": BATCH, "max_length": TOKENS},
        }
        cluster = {"dispatcher": "ray", "engine": "deepspeed", "workers": 8, "zero_stage": stage}
        cluster |= {"micro_batch": MICRO, "gpus_per_worker": 1.0, "activation_checkpointing": True}
        tree = tiny.tree(folder, {"science": science, "cluster": cluster}, tasks=("food", "film"))
        run = parse(RunConfig, tree)
        work = work_of(run, planned(run, (80.0,)))
        lines.append({"what": what, "steps": list(on_paper(work, Machine()))})
    return lines


def main() -> None:
    """Measure, and store what was found."""
    with TemporaryDirectory() as folder:
        found = {
            "measured": measured(Path(folder)),
            "paper": paper(Path(folder)),
            "machine": Machine().name,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "rows": {"tokens": TOKENS, "global_batch": BATCH, "micro_batch": MICRO},
        }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
