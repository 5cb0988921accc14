"""Training with states and parameters in the host's memory: the same result, on two gloo ranks.

On a CPU host and device are one memory; DeepSpeed goes its ways for offload all the same.
"""

import os
import resource
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from cl_dist.config import parse
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import ConfigError
from cl_dist.parallel import files, params
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.partition import full_shape
from cl_dist.run import Run
from cl_dist.run_config import ClusterConfig, RunConfig
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests import parity
from tests.architectures import TINY
from tests.integration import test_divided
from tests.integration.test_frozen import frozen_job
from tests.integration.test_step_checkpoints import train_until
from tests.parity import Trained

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),
]
WIDE = 8192
WAYS: list[dict[str, Any]] = [
    {"zero_stage": 1, "offload": "optimizer"},
    {"zero_stage": 2, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "all"},
]


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda method: parity.run(tmp_path_factory.mktemp("offload"), method))


def second(run: Run, dtype: str = "float32", **engine: Any) -> Job:
    job = replace(run.job(run.stage(parity.SECOND)), engine=EngineConfig(micro_batch=8, **engine))
    return replace(job, model=job.model.model_copy(update={"dtype": dtype}))


def look(rank: int, world: int, job: Job, out: str) -> dict[str, Any]:
    """Train, and say where things were."""
    seen: dict[str, Any] = {}
    module: Any = train
    build = module.build_engine

    def built(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        optimizer: Any = engine._engine.optimizer
        seen["states"] = bool(
            getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
        )
        seen["parameters"] = bool(getattr(optimizer, "offload_param", False))
        pieces = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
        seen["held"] = sum(piece.untyped_storage().nbytes() for piece in pieces)
        folder = job.engine.offload_folder
        own = Path(folder).glob(f"cl-dist-*-{os.getpid()}/**/*.swp") if folder else ()
        seen["files"] = sum(path.stat().st_size for path in own)
        frozen = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
        pieces = [(full_shape(parameter).numel(), *params.local(parameter, rank)) for parameter in frozen]
        seen["frozen"] = [piece[: size - start].detach().double().sum().item() for size, piece, start in pieces]
        return engine

    module.build_engine = built
    try:
        train.run(job, Path(out), lambda event: None)
    finally:
        module.build_engine = build
    return seen


@pytest.mark.parametrize(
    ("method", "way"), [*(("ctr", way) for way in WAYS), ("rational_lamol", WAYS[1]), ("rational_lamol-lora", WAYS[3])]
)
def test_what_is_trained_is_what_one_worker_trains(
    ranks: Ranks, all_runs: Any, tmp_path: Path, method: str, way: Mapping[str, Any]
) -> None:
    run = all_runs(method)
    reference = run.config.folder / "reference"
    expected = (
        Trained.read(reference) if reference.exists() else parity.train_here(second(run, engine="torch"), reference)
    )
    for seen in ranks.run(look, second(run, **way), str(_new(tmp_path / "out")), timeout_s=250.0):
        assert seen["states"]
        assert seen["parameters"] == (way["offload"] == "all")
    found = Trained.read(tmp_path / "out").difference(expected)
    assert found["weights"] <= 1e-5, found
    assert found["metrics"] <= 1e-4, found
    assert found["mask_bits"] == 0, found


@pytest.mark.parametrize("way", [WAYS[1], WAYS[3]])
def test_in_bfloat16_the_masters_are_the_same(
    ranks: Ranks, all_runs: Any, tmp_path: Path, way: Mapping[str, Any]
) -> None:
    run = all_runs("ctr")
    plain = {**way, "offload": None}
    for name, settings in (("plain", plain), ("offload", way)):
        ranks.run(look, second(run, "bfloat16", **settings), str(_new(tmp_path / name)), timeout_s=250.0)
    found = Trained.read(tmp_path / "offload").difference(Trained.read(tmp_path / "plain"))
    assert found["weights"] <= 1e-5, found
    assert found["mask_bits"] == 0, found


def test_a_stage_goes_on_from_a_checkpoint_with_and_without(ranks: Ranks, all_runs: Any, tmp_path: Path) -> None:
    run = all_runs("ctr")
    whole = parity.train_here(second(run, engine="torch"), tmp_path / "whole").weights
    out = _new(tmp_path / "out")
    for way, steps in (({"zero_stage": 2}, 3), (WAYS[3], 8), (WAYS[0], 12), ({"zero_stage": 3}, None)):
        ranks.run(train_until, second(run, **way), str(out), steps, timeout_s=250.0)
    torch.testing.assert_close(dict(ShardedWeights(out)), whole, rtol=0.0, atol=1e-5)


def test_penalties_need_stage_3(ranks: Ranks, all_runs: Any, tmp_path: Path) -> None:
    run = all_runs("ewc")
    tree = run.config.tree()
    tree["cluster"] = {"workers": 2, **WAYS[1]}
    with pytest.raises(ConfigError, match=r"method 'ewc' adds penalties.*zero_stage 2; expected zero_stage 3"):
        parse(RunConfig, tree)
    expected = parity.train_here(second(run, engine="torch"), tmp_path / "here")
    ranks.run(look, second(run, **WAYS[2]), str(_new(tmp_path / "out")), timeout_s=250.0)
    assert Trained.read(tmp_path / "out").difference(expected)["weights"] <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"offload": "optimizer", "zero_stage": 0},
            "offload: optimizer needs engine: deepspeed and zero_stage: 1 or 2 or 3",
        ),
        ({"offload": "all", "zero_stage": 2}, "offload: all needs engine: deepspeed and zero_stage: 3"),
        ({"offload": "optimizer", "engine": "torch"}, "offload: optimizer needs engine: deepspeed"),
        ({"offload": "optimizer", "offload_folder": "/nvme"}, "offload_folder needs offload: all"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ClusterConfig, settings)


def hold(rank: int, world: int, job: Job, out: str) -> None:
    """Train as on a GPU, where DeepSpeed's public calls bring copies of masters that are with the host."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    local = Stage3.get_local_fp32_param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage3, "get_local_fp32_param", lambda *args: local(*args).clone())
        train.run(job, Path(out), lambda event: None)


@pytest.mark.parametrize(("way", "lora"), [(WAYS[0], None), (WAYS[1], {"r": 4}), (WAYS[2], None), (WAYS[3], {"r": 4})])
def test_frozen_heads_keep_their_bits_and_checkpoints_are_written(
    ranks: Ranks, tmp_path: Path, way: Mapping[str, Any], lora: Any
) -> None:
    job = frozen_job(tmp_path / "made", {"level": "head", "lora": lora})
    config = EngineConfig(micro_batch=2, checkpoint_steps=2, verify_protection_every=1, **way)
    ranks.run(hold, replace(job, engine=config), str(_new(tmp_path / "out")), timeout_s=250.0)
    after, before = ShardedWeights(tmp_path / "out"), ShardedWeights(job.chain[-1])
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    held = {name: scale for name, scale in learner.gradient_transforms().items() if scale.decay}
    assert held
    for name, scale in held.items():
        kept = frozen_entries(scale, before[name])
        assert torch.equal(after[name][kept], before[name][kept])
    assert list((tmp_path / "out" / "checkpoints").iterdir())


def test_what_dead_processes_left_in_the_folder_is_removed(tmp_path: Path) -> None:
    own = files.Files(str(tmp_path)).folder
    dead = own.with_name(f"{own.name.rpartition('-')[0]}-999999999")
    for each in (own, dead, tmp_path / "cl-dist-another-host-999999999"):
        each.mkdir()
    files.Files(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {own.name, "cl-dist-another-host-999999999"}


def test_buffers_are_as_many_as_pieces_that_are_whole_at_a_time() -> None:
    maker: Any = AutoModel
    model = maker.from_config(AutoConfig.for_model("llama", **TINY["llama"]))
    assert files.num_buffers(model, lambda parameter: True) == 5
    assert files.num_buffers(nn.ModuleList([nn.ParameterList([torch.ones(1)] * 9), model]), lambda _: True) == 9 + 2
    model.gradient_checkpointing_enable()
    assert files.num_buffers(model, lambda parameter: True) == 9 + 2  # four of attention, three, two norms
    assert files.num_buffers(model, lambda parameter: parameter.dim() == 2) == 7 + 2


def test_memory_that_may_not_be_locked_is_asked_for_before_deepspeed_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8 * 2**20, 8 * 2**20))
    files._check_lockable(8 * 2**20)
    monkeypatch.setattr(files, "_may_lock", lambda: False)
    files._check_lockable(8 * 2**20)
    with pytest.raises(ConfigError, match=r"take 9 MiB of locked memory .* may lock 8 MiB; .*ulimit -l"):
        files._check_lockable(9 * 2**20)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, 0))
    files._check_lockable(2**50)


@pytest.fixture
def aio() -> None:
    """DeepSpeed's operator for files, which it compiles in some minutes where that was not done yet."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("needs libaio's headers and a compiler")
    builder.load(verbose=False)


IN_FILES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "frozen": (test_divided.FROZEN["ctr"], "float32", {}),
    "frozen, rounded": (test_divided.FROZEN["ctr"], "bfloat16", {}),
    "low-rank updates": (test_divided.FROZEN["lamol with lora"], "float32", {}),
    "computed again": (test_divided.FROZEN["lamol with lora"], "float32", {"activation_checkpointing": True}),
    "trained": (test_divided.TRAINED["sequential"], "float32", {}),
    "some kept whole": (test_divided.TRAINED["sequential"], "float32", {"persistence_threshold": 128 * 128}),
    "trained, rounded": (test_divided.TRAINED["lamol"], "bfloat16", {}),
    "frozen heads": (test_divided.TRAINED["heads"], "bfloat16", {}),
}


def small_files(rank: int, world: int, function: Any, *args: Any) -> Any:
    """Run a function of a rank where pieces of 8 KB go into files: a small model has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "MEGABYTE", 8192)
        return function(rank, world, *args)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", IN_FILES)
@pytest.mark.usefixtures("aio")
def test_parameters_in_files_train_the_same_and_leave_no_files(ranks: Ranks, tmp_path: Path, case: str) -> None:
    """A deep model has more pieces than DeepSpeed has buffers. The stage is stopped, and goes on, in between."""
    method, dtype, settings = IN_FILES[case]
    run = test_divided.made(tmp_path, method, intermediate_size=256, num_hidden_layers=16)
    folder = _new(tmp_path / "files")
    job = test_divided.second(run, offload="all", **settings)
    job = replace(job, model=job.model.model_copy(update={"dtype": dtype}))
    watched = {"offload_folder": str(folder), "verify_protection_every": 1}
    in_files = replace(job, engine=job.engine.model_copy(update=watched))
    plain = ranks.run(look, job, str(_new(tmp_path / "plain")), timeout_s=400.0)
    out = str(_new(tmp_path / "out"))
    ranks.run(small_files, train_until, in_files, out, 1, timeout_s=400.0)
    assert list(folder.iterdir()) == []
    found = ranks.run(small_files, look, in_files, out, timeout_s=400.0)
    for before, after in zip(plain, found, strict=True):
        assert before["files"] == 0
        assert after["files"] >= 16 * 3 * 128 * 256 // 2 * (2 if dtype == "bfloat16" else 4)  # half of each
        assert after["held"] < before["held"] / 10
        assert after["frozen"] == before["frozen"]  # read from the files
    difference = Trained.read(tmp_path / "out").difference(Trained.read(tmp_path / "plain"))
    assert difference["weights"] == 0, difference
    assert difference["mask_bits"] == 0
    assert list(folder.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("aio")
def test_pieces_of_a_megabyte_lie_in_files(ranks: Ranks, tmp_path: Path) -> None:
    """Of 2 MB, here; attention's, of 32 KB, do not."""
    run = test_divided.made(tmp_path, test_divided.FROZEN["ctr"], intermediate_size=WIDE, num_hidden_layers=2)
    job = test_divided.second(run, offload="all", offload_folder=str(_new(tmp_path / "files")))
    for seen in ranks.run(look, job, str(_new(tmp_path / "out")), timeout_s=400.0):
        assert seen["files"] == 2 * 3 * 128 * WIDE // 2 * 4  # half of the feed-forward weights


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
