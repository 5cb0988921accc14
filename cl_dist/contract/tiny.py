"""A tiny run, built from nothing: a two-layer BERT of width 32, a tokenizer of forty words, tasks of a few rows."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cl_dist.config import Tree, merged, parse
from cl_dist.methods import get_method
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import Tracker
from cl_dist.sequence import Dispatcher, run_stages

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
THINGS = (
    "cake",
    "laptop",
    "screen",
    "waiter",
    "plot",
    "actor",
    "battery",
    "soup",
    "keyboard",
    "table",
    "ending",
    "sauce",
)
FILLERS = ("the", "is", "was", "and", "very", "quite", "here", "again")
LABELS: Mapping[str, Mapping[str, str]] = {
    "food": {"good": "tasty", "bad": "bland"},
    "film": {"good": "gripping", "bad": "dull"},
    "topic": {"kitchen": "stove", "office": "desk", "garden": "tree"},
}
"""Labels of each task, with the word that gives a row's label away."""
TASKS = tuple(LABELS)
WORDS = (*SPECIAL, *THINGS, *FILLERS, *(word for words in LABELS.values() for word in words.values()))
CTR: Mapping[str, Any] = {
    "name": "ctr",
    "tsm_size": 24,
    "capsule_mid": 6,
    "filters": 5,
    "s_max": 50.0,
    "gate_lr": 0.02,
    "head_lr": 0.01,
}
METHODS: dict[str, Mapping[str, Any]] = {
    "ctr": CTR,
    "lamol": {"name": "lamol", "gamma": 0.5},
    "lamol_real": {"name": "lamol_real", "gamma": 0.5},
    "rational_lamol": {"name": "rational_lamol", "gamma": 0.5, "level": "head", "top_k": 1, "shard_samples": 4},
    "hat": {"name": "hat", "tsm_size": 24, "s_max": 50.0, "head_lr": 0.01},
    "adapter": {"name": "adapter", "size": 8},
    "lora": {"name": "lora", "r": 4},
    "ewc": {"name": "ewc", "strength": 100.0},
    "replay": {"name": "replay", "rows": 7},
    "lifelong_embedding": {"name": "lifelong_embedding"},
    "sequential": {"name": "sequential"},
    "individual": {"name": "individual"},
    "joint": {"name": "joint"},
}
"""Settings with which each method learns something on these tasks: a new method is tested by adding its line.

The option --method of the contract suite adds one of another package."""
SPOKEN = (*WORDS, *dict.fromkeys(label for labels in LABELS.values() for label in labels), "which", "one", "?")
"""The words of a decoder, which spells labels and questions too."""
DECODER: Mapping[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": len(SPOKEN),
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""A GPT-2 with random weights, for methods that answer in text."""


TEXT_TRAIN: Mapping[str, Any] = {"epochs": 16, "lr": 0.01}
"""With these a decoder writes more good samples than bad ones."""


def run_name(method: str) -> str:
    """Return a name for a run of a method: 'package.module:METHOD' is not one."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", method)


def writes(method: str) -> bool:
    """Return whether a method works on decoders alone."""
    return "classifier" not in get_method(method).learners


def save_model(folder: Path) -> Path:
    """Write a BERT with random weights, and its tokenizer, where `from_pretrained` finds them."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = BertModel(config)
        for parameter in model.parameters():  # of a size as if trained: with std 0.02 the layers hardly say anything
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return save_tokenizer(folder, WORDS)


def save_tokenizer(folder: Path, spoken: Sequence[str]) -> Path:
    """Write a tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(spoken)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))],
    )
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no types
    fast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    ).save_pretrained(folder)
    return folder


def rows(task: str, train: int, dev: int = 6, test: int = 10) -> list[dict[str, Any]]:
    """Return rows of a task, all different; their lengths differ too, so that batches are padded."""
    labels = list(LABELS[task].items())
    found = []
    for number in range(train + dev + test):
        label, word = labels[number % len(labels)]
        place, first = divmod(number, len(THINGS))
        fill = [FILLERS[(number * 3 + k) % len(FILLERS)] for k in range(1 + number % 5)]
        words = ["the", THINGS[first], *fill, *(["and"] * place), word]
        split = "train" if number < train else "dev" if number < train + dev else "test"
        row = {"id": f"{task}-{number}", "text": " ".join(words), "label": label, "split": split}
        found.append(row | {"rationale": [[len(words) - 1, len(words)]]})
    return found


def save_rows(path: Path, data: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf8")
    return path


def tree(folder: Path, over: Mapping[str, Any] | None = None, tasks: Sequence[str] = TASKS, train: int = 20) -> Tree:
    """Return a run file over freshly written model and data in folder, with `over` laid over it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "model"
    if not source.exists():
        save_model(source)
    for task in tasks:
        path = folder / f"{task}.jsonl"
        if not path.exists():
            save_rows(path, rows(task, train))
    base: Tree = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "science": {
            "model": {"source": str(source)},
            "method": dict(CTR),
            "train": {"epochs": 2, "lr": 0.005, "global_batch": 8, "max_length": 16, "min_round_steps": 3},
            "evaluate": {"batch": 4, "shard_rows": 6},
            "tasks": [
                {
                    "id": task,
                    "row_id": "id",
                    "source": {"kind": "jsonl", "path": str(folder / f"{task}.jsonl"), "split": {"by": "field"}},
                }
                for task in tasks
            ],
        },
        "cluster": {"dispatcher": "local", "engine": "torch"},
    }
    science = (over or {}).get("science", {})
    method = science.get("method")
    if science.get("model", {}).get("output") == "lm" or (method is not None and writes(method["name"])):
        spelling = save_tokenizer(folder / "decoder", SPOKEN)
        base["science"]["model"] = {"source": str(spelling), "config": dict(DECODER), "spare_task_tokens": 4}
        base["science"]["generate"] = {"parallel_samples": 3, "shard_samples": 4, "min_yield": 0.0, "top_k": 5}
        for task in base["science"]["tasks"]:
            task |= {"question": "which one ?", "rationale": "rationale"}
        base["science"]["train"] |= TEXT_TRAIN
    result = merged(base, over or {})
    if method is not None:
        result["science"]["method"] = method  # replaced, as in a run's baselines
    return result


def make_run(folder: Path, over: Mapping[str, Any] | None = None, **data: Any) -> Run:
    """Return the workbook of a tiny run."""
    return Run(parse(RunConfig, tree(folder, over, **data)))


def compute(run: Run, dispatcher: Dispatcher | None = None) -> Run:
    """Compute a run to its end in this process, or on the given dispatcher."""
    from cl_dist.dispatch_local import LocalDispatcher

    run_stages(run, dispatcher or LocalDispatcher(), Tracker(run))
    return run
