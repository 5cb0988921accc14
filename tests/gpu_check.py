"""What a GPU does with two methods at the sizes that they are for: `python -m tests.gpu_check [--small]`.

One task of CTR on a backbone of BERT-base's size, then two tasks of Rational LAMOL on a decoder of a billion parameters
with random weights, both in bfloat16 through Ray on all GPUs of this machine. Prints tokens a second, the share of the
device's peak, how long a vote takes beside the training that it freezes, and how fast samples are written. --small does
the same with tiny models on two CPU workers, to try the commands where there is no GPU.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from cl_dist.config import Tree, merged, parse
from cl_dist.run_config import RunConfig
from launcher.planning import planned
from launcher.scaling import work_of
from tests import tiny
from tests.integration.ray_runs import Command

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "A10": 125e12}
"""Dense bfloat16 operations a second, by a word of the device's name."""
BASE = {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12} | {
    "num_attention_heads": 12,
    "vocab_size": 30522,
}
BILLION = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPARE = 4
WORDS = (*tiny.SPOKEN, *(f"word{number}" for number in range(32000 - len(tiny.SPOKEN) - 4 - SPARE)))
"""Of the decoder: with the 4 special tokens and those of tasks they are its whole vocabulary. What an untrained model
draws is hardly ever special then, and its samples are as long as may be."""
RUNS: dict[str, tuple[Tree, Tree, Tree]] = {
    "ctr": (BASE, {"name": "ctr"}, {"global_batch": 256, "max_length": 128}),
    "rational_lamol": (
        BILLION,
        {"name": "rational_lamol", "gamma": 0.25, "level": "head", "top_k": 8},
        {"global_batch": 64, "max_length": 512},
    ),
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
}


def tree_of(folder: Path, name: str, small: bool) -> Tree:
    """Return the run file of one of the two, over data that it writes."""
    sizes, method, train = RUNS[name]
    sizes = {**sizes, **SMALL} if small else sizes
    train = {**train, "global_batch": 8, "max_length": 64} if small else train
    gpus = 0 if small else torch.cuda.device_count()
    tree = tiny.tree(folder / name, {}, tasks=("food", "film"), train=16 if small else 4 * train["global_batch"])
    tasks = tree["science"]["tasks"]
    for task in tasks:
        path = Path(task["source"]["path"])
        rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
        for row in rows:
            row["text"] += " the" * train["max_length"]  # cut off at max_length: all rows are equally long
        tiny.save_rows(path, rows)
    over = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "science": {
            "model": {"config": sizes, "dtype": "bfloat16"},
            "method": {"name": method["name"]},
            "train": {**train, "epochs": 2, "lr": 1e-4, "select": "last", "min_round_steps": 1},
            "generate": {"min_yield": 0.0, "max_attempts": 2, "shard_samples": 2 if small else 32},
        },
        "cluster": {"dispatcher": "ray", "engine": "deepspeed", "zero_stage": 2, "workers": gpus or 2}
        | {"gpus_per_worker": 1 if gpus else 0, "micro_batch": 4 if small else 16, "activation_checkpointing": True},
    }
    tree = merged(tree, over)
    tree["science"]["method"] = method
    tree["science"]["tasks"] = tasks if name != "ctr" else tasks[:1]
    if name != "ctr":
        words = tiny.save_tokenizer(folder / "words", WORDS)
        tree["science"]["model"] |= {"answers": "text", "source": str(words), "spare_task_tokens": SPARE}
        tree["science"]["method"] = method | {"rationales": "gradient"}
    return tree


def checked(folder: Path, name: str, small: bool) -> dict[str, Any]:
    """Run one of the two and return what its stages tell."""
    tree = tree_of(folder, name, small)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf8")
    command = Command(folder, "train", str(path))
    if command.end(1200.0):
        raise RuntimeError(command.output)
    summary = json.loads((folder / "runs" / name / "metrics" / "summary.json").read_text(encoding="utf8"))
    samples = (folder / "runs" / name).glob("stages/*/generate/replay.json")
    written = [facts for path in samples for facts in json.loads(path.read_text(encoding="utf8"))["tasks"].values()]
    return {"what": name, **_speed(summary["stages"], parse(RunConfig, tree)), **_written(summary, written)}


def _speed(stages: list[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    first = next(stage for stage in stages if stage["kind"] == "train")
    rate = first["metrics"]["perf/tokens_per_s"]
    work = work_of(config, planned(config, (80.0,)))
    operations = rate / work.tokens * work.operations  # all rows have as many tokens as may be
    gpus = config.cluster.workers if config.cluster.gpus_per_worker else 0
    device = torch.cuda.get_device_name() if gpus else "CPU"
    peak = next((peak for word, peak in PEAKS.items() if word in device), None)
    seconds: dict[str, float] = {}
    for stage in stages:
        seconds[stage["kind"]] = round(seconds.get(stage["kind"], 0.0) + stage["seconds"], 2)
    return {
        "device": f"{max(gpus, 1)} x {device}",
        "parameters": work.elements,
        "tokens_per_s": round(rate, 1),
        "share_of_peak": None if peak is None else round(operations / (peak * gpus), 4),
        "seconds": seconds,
    }


def _written(summary: dict[str, Any], written: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many samples were asked for and written, and the tokens a second of the stage, loading included."""
    if not written:
        return {}
    found = {name: sum(facts[name] for facts in written) for name in ("requested", "generated", "kept", "tokens")}
    found["faults"] = {name: count for facts in written for name, count in facts["faults"].items() if count}
    seconds = sum(stage["seconds"] for stage in summary["stages"] if stage["kind"] == "generate")
    return {"generation": found | {"tokens_per_s": round(found["tokens"] / seconds, 1)}}


def main() -> None:
    """Check and print."""
    small = "--small" in sys.argv
    if not small and not torch.cuda.is_available():
        sys.exit("no CUDA device: `python -m tests.gpu_check --small` tries the commands on CPU workers")
    with TemporaryDirectory() as folder:
        for name in RUNS:
            sys.stdout.write(json.dumps(checked(Path(folder), name, small)) + "\n")


if __name__ == "__main__":
    main()
