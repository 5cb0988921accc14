"""How far training on several workers is from training on one worker with plain torch, without DeepSpeed.

41 train rows in global batches of 32 are batches of 32 and 9, which three ranks cannot share evenly. The second of two
tasks is trained, 20 steps, with decay and clipping, on a model of two layers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef, ref
from cl_dist.stages import train
from cl_dist.stages.shards import sharded
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights

ROWS, GLOBAL_BATCH, STEPS = 41, 32, 20
TRAIN = {"epochs": 10, "global_batch": GLOBAL_BATCH, "lr": 1e-3, "weight_decay": 0.01, "min_round_steps": 10}
SEED = 4
"""The router takes maxima over windows. Where two windows differ by less than rounding, each order of summation takes
another one, and the weights of that filter part by whole steps: a seed is chosen whose margins are wide."""
ZERO_STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
SECOND = StageRef(task=1, stage="train")
SETTINGS = {**tiny.METHODS, "rational_lamol-lora": {**tiny.METHODS["rational_lamol"], "lora": {"r": 4}}}
"""Settings of each method, and of variants that train something else."""


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    method: str
    """A key of SETTINGS."""
    zero_stage: Literal[0, 1, 2, 3]
    workers: int
    accumulation: int

    @property
    def engine(self) -> EngineConfig:
        """Settings of the engine; tiny parameters are cut up too, which ZeRO-3 would by default keep whole."""
        share = -(-GLOBAL_BATCH // self.workers)
        micro = -(-share // self.accumulation)
        return EngineConfig(zero_stage=self.zero_stage, micro_batch=micro, persistence_threshold=0)


@dataclass(frozen=True)
class Trained:
    """What a Train stage wrote."""

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    rounds: list[dict[str, float]]

    @classmethod
    def read(cls, folder: Path) -> "Trained":
        """Read a stage's folder."""
        state = folder / "learner.safetensors"
        facts = json.loads((folder / "train.json").read_text())
        weights = dict(ShardedWeights(folder))
        return cls(weights, load_file(state) if state.exists() else {}, facts["rounds"])

    def difference(self, other: "Trained") -> dict[str, float]:
        """Return the largest difference of weights (absolute) and round metrics (relative to 1 or more).

        With them, the number of mask bits that differ; other learner state counts as weights.
        """
        assert self.weights.keys() == other.weights.keys()
        assert self.state.keys() == other.state.keys()
        masks = {name for name, value in self.state.items() if value.dtype == torch.uint8}
        floats = [(self.weights[n], other.weights[n]) for n in self.weights]
        floats += [(self.state[n], other.state[n]) for n in self.state.keys() - masks]
        pairs = [(a[k], b[k]) for a, b in zip(self.rounds, other.rounds, strict=True) for k in a]
        return {
            "weights": max(float((a - b).abs().max()) for a, b in floats),
            "metrics": max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs),
            "mask_bits": sum(_bits(self.state[name] ^ other.state[name]) for name in masks),
        }


def _bits(values: Tensor) -> int:
    return sum(int(byte).bit_count() for byte in values.flatten().tolist())


def run(folder: Path, method: str) -> Run:
    """Return a run of two tasks whose first one is trained, on one worker."""
    settings = tiny.METHODS[method] if method in tiny.METHODS else SETTINGS[method]
    science = {"method": dict(settings), "seed": SEED, "train": TRAIN}
    tree = tiny.tree(
        folder, {"run": {"name": tiny.run_name(method)}, "science": science}, tasks=("food", "film"), train=ROWS
    )
    if tiny.writes(settings["name"]):  # the first task must be learned well enough to write samples of it
        tree["science"]["tasks"][0]["train"] = dict(tiny.TEXT_TRAIN)
    made = Run(parse(RunConfig, tree))
    for stage in (*made.plan(0), *made.plan(1)):
        out = made.ledger.path(ref(stage))
        if out.exists() or ref(stage) == SECOND or stage.kind == "evaluate":
            continue
        if stage.kind == "train":
            train_here(made.job(stage), out)
            continue
        out.mkdir(parents=True)
        job, kind = made.job(stage), sharded(stage.kind)
        worker = kind.worker(job)
        kind.merge(job, [(shard, worker.run(shard)) for shard in kind.cut(job)], out)
    return made


def train_here(job: Job, out: Path) -> Trained:
    """Train in this process with plain torch."""
    out.mkdir(parents=True)
    train.run(job, out, lambda event: None)
    return Trained.read(out)


def train_on_rank(rank: int, world: int, job: Job, out: str) -> None:
    """Train as one rank of a gang."""
    train.run(job, Path(out), lambda event: None)


def train_on(ranks: Ranks, cell: Cell, made: Run, out: Path) -> Trained:
    """Train on a gang with DeepSpeed."""
    assert ranks.world == cell.workers
    out.mkdir(parents=True)
    job = replace(made.job(made.stage(SECOND)), engine=cell.engine)
    ranks.run(train_on_rank, job, str(out), timeout_s=300.0)
    return Trained.read(out)
