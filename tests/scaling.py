"""Weak and strong scaling of training over worker processes of this machine, and of many GPUs on paper.

`python -m tests.scaling OUT.json` trains one task through Ray with 1, 2 and 4 workers, one thread each, and keeps what
cluster_configs/SCALING.md shows. --paper keeps what was measured, and does only the arithmetic again.
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
from cl_dist.contract import tiny
from cl_dist.planning.planner import planned, with_scaling
from cl_dist.planning.scaling import Machine
from cl_dist.run_config import RunConfig
from cl_dist.stage import EvaluateConfig, GenerateConfig
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
PAPER: Mapping[str, tuple[Mapping[str, Any], str, int, int]] = {
    "rational_lamol, 8B, ZeRO-2": (LLAMA_8B, "rational_lamol", 2, 1),
    "lamol, 8B, ZeRO-3": (LLAMA_8B, "lamol", 3, 1),
    "lamol, 70B, ZeRO-3": (LLAMA_70B, "lamol", 3, 4),
}
"""Sizes, method, ZeRO stage, workers_per_model."""
TOKENS, BATCH, MICRO = 1024, 256, 4
TRAIN, DEV, TEST, EPOCHS = 10_000, 200, 1000, 5


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
            "train": {"epochs": 4, "global_batch": batch, "keep": "last", "lr": 1e-4},
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
    """Return what a step and the second task's stages cost on 8 to 512 GPUs for large decoders, from their configs."""
    folder.mkdir()
    for task in ("food", "film"):
        tiny.save_rows(folder / f"{task}.jsonl", _numbered(task))
    lines = []
    for what, (sizes, method, stage, per_model) in PAPER.items():
        science = {
            "model": {"source": str(folder), "config": sizes, "dtype": "bfloat16", "output": "lm"},
            "method": {"name": method, "gamma": 0.2},
            "train": {"global_batch": BATCH, "max_length": TOKENS, "epochs": EPOCHS},
            "evaluate": EvaluateConfig().model_dump(),
            "generate": GenerateConfig().model_dump(),
        }
        cluster = {"dispatcher": "ray", "engine": "deepspeed", "workers": 8, "zero_stage": stage}
        cluster |= {"micro_batch": MICRO, "gpus_per_worker": 1.0, "activation_checkpointing": True}
        cluster |= {"workers_per_model": per_model}
        tree = tiny.tree(folder, {"science": science, "cluster": cluster}, tasks=("food", "film"))
        run = parse(RunConfig, tree)
        plan = with_scaling(planned(run, (80.0,)), run).document()
        steps = plan["scaling"]
        stages = [line for line in plan["stage_seconds"] if line["stage"].startswith("01-film/")]
        lines.append({"what": what, "steps": steps, "stages": stages})
    return lines


def _numbered(task: str) -> list[dict[str, Any]]:
    """Return as many rows as are assumed; what they say does not matter, since all are taken to be of full length."""
    splits = ["train"] * TRAIN + ["dev"] * DEV + ["test"] * TEST
    labels = list(tiny.LABELS[task])
    return [
        {"id": f"{task}-{number}", "text": f"{task} {number}", "label": labels[number % 2], "split": split}
        | {"rationale": [[0, 1]]}
        for number, split in enumerate(splits)
    ]


def main() -> None:
    """Measure, and store what was found."""
    out = Path(sys.argv[1])
    with TemporaryDirectory() as folder:
        if "--paper" in sys.argv:
            found = json.loads(out.read_text(encoding="utf8"))
        else:
            found = {"measured": measured(Path(folder)), "cores": os.cpu_count(), "torch": torch.__version__}
        found |= {
            "paper": paper(Path(folder) / "paper"),
            "machine": Machine().name,
            "rows": {"tokens": TOKENS, "global_batch": BATCH, "micro_batch": MICRO}
            | {"train": TRAIN, "test": TEST, "epochs": EPOCHS},
        }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
