"""A gang of two trains what one worker trains: ZeRO 0-3 on two gloo ranks against plain torch in this process.

39 train rows in global batches of 15 are batches of 15, 15 and 9: none of them divides by two ranks.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.models import capsules
from cl_dist.models.plugin import unpack
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.stage import StageRef
from cl_dist.stages import train
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),  # the first test also starts the ranks, on a machine that may be busy
]
TRAIN = {"epochs": 7, "global_batch": 15, "lr": 1e-3, "weight_decay": 0.01, "min_round_steps": 10}
ZeroStage = Literal[0, 1, 2, 3]
SEED = 1
"""The router takes maxima over windows. Where two windows differ by less than rounding, each order of summation takes
another one, and the weights of that filter go apart by whole steps (6e-4 was seen at a margin of 6e-8). Of the seeds 0
to 59 this is the one with the widest margins, about 4e-6; a test below looks that there is one."""
SECOND = StageRef(task=1, stage="train")
NEAREST = {**tiny.METHODS["hat"], "inherit": "nearest"}


def train_here(job: Job, out: Path) -> "Result":
    out.mkdir(parents=True)
    train.run(job, out, lambda event: None)
    return Result(out)


def train_on_ranks(rank: int, world: int, job: Job, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


@dataclass(frozen=True)
class Result:
    """What a Train stage wrote."""

    folder: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(ShardedWeights(self.folder))

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "train.json").read_text())
        return facts

    @property
    def masks(self) -> bytes:
        return (self.folder / "learner.safetensors").read_bytes()


class Gang:
    """Trains the second of two tasks, after a first one, by torch here and by DeepSpeed on two ranks."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self.start, self.reference = cache(self._start), cache(self._reference)

    def _start(self, method: str, select: str) -> Run:
        """Return a run whose first task is trained, on one worker."""
        settings = tiny.CTR if method == "ctr" else NEAREST if method == "nearest" else {"name": method}
        rate = {"lr": 0.03} if method == "nearest" else {}  # the first task learns what is of use for the second
        over = {
            "run": {"name": method},
            "science": {"method": dict(settings), "seed": SEED, "train": TRAIN | rate | {"keep": select}},
        }
        run = tiny.make_run(self._folder, over, tasks=("food", "film"), train=39)
        first = StageRef(task=0, stage="train")
        train_here(run.job(run.stage(first)), run.ledger.path(first))
        return run

    def first(self, method: str, select: str) -> Result:
        return Result(self.start(method, select).ledger.path(StageRef(task=0, stage="train")))

    def _reference(self, method: str, select: str) -> Result:
        return train_here(self._job(method, select), self._folder / "reference" / method)

    def train(self, method: str, select: str, zero_stage: ZeroStage, micro_batch: int | Literal["auto"]) -> Result:
        # Tiny parameters are cut up too: by default ZeRO-3 would keep all of them whole.
        engine = EngineConfig(zero_stage=zero_stage, micro_batch=micro_batch, persistence_threshold=0)
        return self.run(replace(self._job(method, select), engine=engine), f"{method}-{zero_stage}-{micro_batch}")

    def run(self, job: Job, name: str) -> Result:
        out = self._folder / name
        out.mkdir(parents=True)
        self._ranks.run(train_on_ranks, job, str(out), timeout_s=150.0)
        return Result(out)

    def _job(self, method: str, select: str) -> Job:
        run = self.start(method, select)
        return run.job(run.stage(SECOND))


@pytest.fixture(scope="module")
def gang(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    return Gang(ranks, tmp_path_factory.mktemp("gang"))


def assert_same_training(found: Result, expected: Result) -> None:
    torch.testing.assert_close(found.weights, expected.weights, rtol=0.0, atol=1e-5)
    assert found.facts["selected_step"] == expected.facts["selected_step"]
    for round_found, round_expected in zip(found.facts["rounds"], expected.facts["rounds"], strict=True):
        assert round_found == pytest.approx(round_expected, rel=1e-4)


def protected(first: Result) -> dict[str, Tensor]:
    """Return which entries of the plugins' shared layers the first task uses: True must not move."""
    packed = load_file(first.folder / "learner.safetensors")
    found: dict[str, Tensor] = {}
    for name in ("0.attention", "0.ffn", "1.attention", "1.ffn"):
        layer, block = name.split(".")
        where = f"backbone.encoder.layer.{layer}.{'attention.' if block == 'attention' else ''}output.dropout"
        used1 = unpack(packed[f"{name}.mask1"], int(tiny.CTR["tsm_size"]))[0]
        used2 = unpack(packed[f"{name}.mask2"], 32)[0]
        found |= {
            f"{where}.fc1.weight": used1[:, None].expand(-1, 32),
            f"{where}.fc1.bias": used1,
            f"{where}.fc2.weight": used2[:, None] & used1,
            f"{where}.fc2.bias": used2,
        }
    return found


def assert_protected(before: Result, after: Result) -> None:
    old, new = before.weights, after.weights
    for name, kept in protected(before).items():
        assert kept.any(), name
        assert torch.equal(old[name][kept], new[name][kept]), f"{name}: what the first task uses has moved"
        assert not torch.equal(old[name][~kept], new[name][~kept]), f"{name}: what is free has not been trained"


def test_no_two_windows_are_so_close_that_rounding_chooses(
    gang: Gang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the tests below may too, with nothing wrong but SEED."""
    margins, max_conv = [], capsules.max_conv

    def watch(u_XDL: Tensor, weight_CDk: Tensor, token_mask_XL: Tensor) -> Tensor:
        out_XCL = F.conv1d(F.pad(u_XDL, (0, weight_CDk.shape[-1] - 1)), weight_CDk).detach()
        first, second = out_XCL.masked_fill(~token_mask_XL[:, None, :], float("-inf")).topk(2).values.unbind(-1)
        margins.append(float((first - second).min()))
        return max_conv(u_XDL, weight_CDk, token_mask_XL)

    monkeypatch.setattr(capsules, "max_conv", watch)
    run = gang.start("ctr", "last")
    train_here(run.job(run.stage(SECOND)), tmp_path / "out")
    assert min(margins) > 2e-7


@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(0, "auto"), (1, 4), (2, 2), (3, "auto")])
def test_ctr_on_two_ranks_is_that_of_one_worker(
    gang: Gang, zero_stage: ZeroStage, micro_batch: int | Literal["auto"]
) -> None:
    expected, found = gang.reference("ctr", "last"), gang.train("ctr", "last", zero_stage, micro_batch)
    assert expected.facts["selected_step"] == 21
    assert_same_training(found, expected)
    assert found.masks == expected.masks
    assert_protected(gang.first("ctr", "last"), found)


def test_plain_torch_accumulates_to_the_same_weights(gang: Gang, tmp_path: Path) -> None:
    run = gang.start("ctr", "last")
    job = replace(run.job(run.stage(SECOND)), engine=EngineConfig(engine="torch", micro_batch=4))
    found, expected = train_here(job, tmp_path / "out"), gang.reference("ctr", "last")
    assert_same_training(found, expected)
    assert found.masks == expected.masks


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bfloat16_does_not_move_protected_entries_by_one_bit(gang: Gang, tmp_path: Path, zero_stage: ZeroStage) -> None:
    over = {
        "run": {"name": "half"},
        "science": {"model": {"dtype": "bfloat16"}, "train": TRAIN | {"epochs": 1, "keep": "last"}},
        "cluster": {"engine": "deepspeed", "zero_stage": zero_stage, "micro_batch": 4},
    }
    run = tiny.make_run(tmp_path, over, tasks=("food", "film"), train=39)
    stages = [StageRef(task=t, stage="train") for t in (0, 1)]
    first, second = (gang.run(run.job(run.stage(stage)), str(run.ledger.path(stage))) for stage in stages)
    gate = first.weights["backbone.encoder.layer.0.output.dropout.gate1_0"]
    assert not torch.equal(gate, gate.bfloat16().float()), "the masters are to be kept, not their rounded copies"
    assert_protected(first, second)


def test_two_ranks_start_from_the_task_that_one_worker_starts_from(gang: Gang, tmp_path: Path) -> None:
    expected, found = gang.reference("nearest", "last"), gang.train("nearest", "last", 2, 4)
    assert expected.facts["learner"]["inherited_from"] == found.facts["learner"]["inherited_from"] == 0
    assert_same_training(found, expected)
    start = gang.first("nearest", "last").weights
    named = {name: value for name, value in found.weights.items() if "gate1_1" in name}
    moved = [(value - start[name.replace("gate1_1", "gate1_0")]).abs().max().item() for name, value in named.items()]
    assert 0 < max(moved) < 1  # gates of its own, which were the first task's
