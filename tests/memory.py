"""How far the memory that `cl-dist plan` tells is from what tensors really hold.

`python -m tests.memory OUT.json` measures all of it: the most bytes of live tensor storage in a step of the second
task's Train stage, from its second step on, when the optimizer has its moments, with rows that are all as long as they
may be. Generate, Record and Vote are measured once their model is loaded.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cl_dist.config import Tree, parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.parallel.config import EngineConfig
from cl_dist.planning.live import LiveTensorBytes
from cl_dist.planning.plan import MemoryPlan
from cl_dist.planning.planner import planned
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import Stage, StageRef, ref
from cl_dist.stages import train
from cl_dist.stages.shards import sharded
from cl_dist.stages.stage_job import Job

LENGTH, BATCH = 128, 16
SECOND = StageRef(task=1, stage="train")
ENCODER = {"model_type": "bert", "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4} | {
    "intermediate_size": 768,
    "vocab_size": 3000,
    "max_position_embeddings": LENGTH,
}
DECODER = {"model_type": "gpt2", "n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": LENGTH} | {
    "vocab_size": 3000,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, tuple[Tree, Tree]] = {
    "sequential": ({"name": "sequential"}, ENCODER),
    "ctr": ({"name": "ctr", "tsm_size": 384}, ENCODER),
    "lamol": ({"name": "lamol", "gamma": 0.25}, DECODER),
    "rational_lamol": ({"name": "rational_lamol", "gamma": 0.25, "level": "head"}, DECODER),
    "rational_lamol-gradient": ({"name": "rational_lamol", "gamma": 0.25, "rationales": "gradient"}, DECODER),
}
"""Method and backbone."""
POOLED = {
    "lamol": ["generate"],
    "rational_lamol": ["generate", "record", "vote"],
    "rational_lamol-gradient": ["record"],
}
"""Which stages are measured that are cut into shards."""
GANGS = ((1, None), (2, 0), (2, 1), (2, 2), (2, 3), (4, 3))
"""(workers, ZeRO stage); without a stage it is plain torch."""


def config(folder: Path, name: str, workers: int, zero_stage: int | None, **cluster: Any) -> RunConfig:
    """Return a run of two tasks with long rows."""
    method, model = CASES[name]
    settings = {"epochs": 1, "global_batch": BATCH, "max_length": LENGTH, "keep": "last", "lr": 1e-3}
    over = {"run": {"name": name}, "science": {"method": method, "train": settings}}
    (folder / name).mkdir(exist_ok=True)
    tree = tiny.tree(folder / name, over, tasks=("food", "film"), train=2 * BATCH)
    for task in ("food", "film"):
        path = folder / name / f"{task}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
        for row in rows:
            row["text"] += " the" * (2 * LENGTH - len(row["text"].split()))
        tiny.save_rows(path, rows)
    tree["science"]["model"]["config"] = model
    tree["science"]["generate"] = {"parallel_samples": 8, "min_yield": 0.0, "max_attempts": 1}
    engine = "torch" if zero_stage is None else "deepspeed"
    local = {"dispatcher": "local"} if workers == 1 else {"dispatcher": "ray"}
    tree["cluster"] = {"workers": workers, "engine": engine, "zero_stage": zero_stage or 0, **local, **cluster}
    return parse(RunConfig, tree)


def estimated(run: RunConfig) -> MemoryPlan:
    """Return the memory of a run's plan."""
    memory = planned(run, ()).memory
    assert memory is not None
    return memory


def peak(rank: int, world: int, job: Job, out: str) -> int:
    """Train a stage on a rank and return the most bytes of its later steps."""
    live, most = LiveTensorBytes(), 0

    def alive(step: int) -> None:
        nonlocal most
        if step == 1:
            live.restart()
        most = live.peak

    Path(out).mkdir(parents=True, exist_ok=True)
    with live:
        train.run(job, Path(out), lambda event: None, heartbeat=alive)
    return most


def prepared(run: RunConfig, upto: StageRef) -> Run:
    """Compute the stages before one, in this process."""
    opened = Run(run)
    for stage in (*opened.plan(0), *opened.plan(1)):
        out = opened.ledger.path(ref(stage))
        if ref(stage) == upto:
            break
        if stage.kind == "evaluate" or out.exists():
            continue
        out.mkdir(parents=True)
        if stage.kind == "train":
            job = replace(opened.job(stage), engine=EngineConfig(engine="torch"))
            train.run(job, out, lambda event: None)
        else:
            shard(opened, stage, out)
    return opened


def shard(opened: Run, stage: Stage, out: Path | None = None) -> int:
    """Compute a stage that is cut into shards, and return the most bytes once its model is there."""
    job, kind, live = opened.job(stage), sharded(stage.kind), LiveTensorBytes()
    with live:
        worker = kind.worker(job)
        live.restart()
        results = [(each, worker.run(each)) for each in kind.cut(job)]
    if out is not None:
        kind.merge(job, results, out)
    return live.peak


def training(folder: Path, name: str, gangs: tuple[tuple[int, int | None], ...] = GANGS) -> Iterator[Tree]:
    """Yield what was told and what was measured of a method's gangs."""
    pools: dict[int, Ranks] = {}
    for workers, zero_stage in gangs:
        for micro_batch in ("auto", 1):
            run = config(folder, name, workers, zero_stage, micro_batch=micro_batch)
            opened = prepared(run, SECOND)
            job, out = opened.job(opened.stage(SECOND)), folder / f"{name}-{workers}-{zero_stage}-{micro_batch}"
            if workers == 1:
                most = peak(0, 1, job, str(out))
            else:
                pool = pools.setdefault(workers, Ranks(workers))
                most = max(pool.run(peak, job, str(out), timeout_s=300.0))
            line = {"what": f"{name}, train", "workers": workers, "zero_stage": zero_stage}
            yield line | {"micro_batch": micro_batch, "told": estimated(run).configured.estimate.peak, "measured": most}
    for pool in pools.values():
        pool.close()


def pooled(folder: Path, name: str) -> Iterator[Tree]:
    """Yield what was told and what was measured of the stages that are cut into shards."""
    run = config(folder, name, 1, None)
    memory = estimated(run)
    for stage in Run(run).plan(1):
        if stage.kind in POOLED[name]:
            opened = prepared(run, ref(stage))
            found = {
                "told": sum(each.bytes for each in memory.pool[stage.kind]),
                "measured": shard(opened, stage),
            }
            yield {"what": f"{name}, {stage.kind}", "workers": 1, "zero_stage": None, "micro_batch": None} | found


def measure(folder: Path) -> Iterator[Tree]:
    """Yield every line."""
    for name in ("sequential", "ctr", "lamol"):
        yield from training(folder, name)
    for name in POOLED:
        yield from pooled(folder, name)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    lines = []
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        for line in measure(Path(folder)):
            sys.stdout.write(json.dumps(line) + "\n")
            lines.append(line)
    facts = {"length": LENGTH, "global_batch": BATCH, "torch": torch.__version__, "lines": lines}
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
