"""A backbone that is cut up while it is loaded: ZeRO-3 on two gloo ranks, none of which ever holds all of it.

What is alive is counted: bytes of the storages of tensors, each once, from their making to their end. Files that are
mapped into memory do not count, since their pages are the operating system's to keep or drop.
"""

import os
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.models.architectures import layers_of
from cl_dist.models.lowrank import own_parameters
from cl_dist.models.plugin import CtrClassifier
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests import parity
from tests.architectures import TINY
from tests.parity import Trained

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),
]
LAYERS = 6
TRAIN = {"epochs": 1, "global_batch": 4, "min_round_steps": 1, "keep": "last", "weight_decay": 0.5}
DEEP = {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 2048, "initializer_range": 0.1}


class Watchdog(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                if storage._cdata not in given:  # not a view, nor a file in a tensor's clothes
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        place = storage._cdata
        if place in self._known:
            return
        size = storage.nbytes()
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@dataclass(frozen=True)
class Seen:
    """What a rank saw while it trained a stage."""

    built: int
    """Bytes alive at most until the model was built, with the weights of the task before."""
    peak: int
    """The same until the trained weights were saved."""
    whole: int
    """Most bytes of the backbone's parameters that were whole at a time when a layer began or ended."""


def observe(rank: int, world: int, job: Job, out: str) -> Seen:
    whole: list[int] = []
    peaks: list[int] = []

    def look(model: Any) -> None:
        whole.append(sum(p.untyped_storage().nbytes() for p in backbone_of(model)))

    module: Any = train
    build = module.build_learner

    def built(*args: Any, **kwargs: Any) -> Any:
        learner = build(*args, **kwargs)
        peaks.append(alive.peak)
        look(learner.model)
        for _, layer in layers_of(learner.model.backbone):
            layer.register_forward_pre_hook(lambda *_: look(learner.model))
            layer.register_full_backward_pre_hook(lambda *_: look(learner.model))
        return learner

    module.build_learner = built
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # tensors made by other threads would not be counted
    try:
        with Watchdog() as alive:
            train.run(job, Path(out), lambda event: None)
    finally:
        module.build_learner = build
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
    return Seen(peaks[0], alive.peak, max(whole))


FROZEN: dict[str, Any] = {
    "ctr": {**tiny.CTR, "tsm_size": 8, "capsule_mid": 4, "filters": 3},
    "lamol with lora": {"name": "lamol", "gamma": 0.0, "lora": {"r": 4}},
}


TRAINED: dict[str, Any] = {
    "sequential": {"name": "sequential"},
    "lamol": {"name": "lamol", "gamma": 0.0},
    "heads": {"name": "rational_lamol", "gamma": 0.0, "freeze": "list", "level": "head", "frozen_units": [[1, 0]]},
}


@pytest.fixture(scope="module", params=FROZEN)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("divided"), FROZEN[request.param])


@pytest.fixture(scope="module", params=TRAINED)
def trained_book(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("trained"), TRAINED[request.param])


def made(folder: Path, method: Any, **over: Any) -> Run:
    """Return a run on a deep backbone in a folder, whose first task is trained."""
    sizes = {**TINY["llama"], **DEEP, "vocab_size": len(tiny.SPOKEN), "pad_token_id": 0, **over}
    maker: Any = AutoModelForCausalLM if tiny.writes(method["name"]) else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = maker.from_config(AutoConfig.for_model("llama", **sizes))
        model.to(torch.bfloat16).save_pretrained(folder / "deep")  # as published ones are: loaded, it is made anew
    tiny.save_tokenizer(folder / "deep", tiny.SPOKEN)
    science = {"method": method, "seed": parity.SEED, "model": {"source": str(folder / "deep")}, "train": dict(TRAIN)}
    tree = tiny.tree(folder, {"science": science}, tasks=("food", "film"), train=8)
    tree["science"]["model"].pop("config", None)
    run = Run(parse(RunConfig, tree))
    first = StageRef(task=0, stage="train")
    parity.train_here(run.job(run.stage(first)), run.ledger.path(first))
    return run


def second(run: Run, **engine: Any) -> Job:
    engine = {"zero_stage": 3, "micro_batch": 1, **engine}
    return replace(run.job(run.stage(parity.SECOND)), engine=EngineConfig(**engine))


def backbone_bytes(job: Job) -> int:
    return sum(parameter.numel() * 4 for parameter in backbone_of(build_learner(job).model))


def backbone_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what no method has put there."""
    own = model.own_parameters().keys() if isinstance(model, CtrClassifier) else own_parameters(model)
    return [p for name, p in model.named_parameters() if name not in own and ".heads." not in f".{name}"]


def test_no_rank_holds_the_whole_model_from_building_to_saving(ranks: Ranks, run: Run, tmp_path: Path) -> None:
    """Otherwise loaded it would, so that the count can fail; what is trained is the same to the bit.

    The most that is alive, 0.92 of the backbone here, is half of it, what is gathered, plugins, moments, activations.
    """
    job = second(run, activation_checkpointing=tiny.writes(run.config.science.method.name))  # LAMOL reads rows twice
    size = backbone_bytes(job)
    divided, whole = trained_both_ways(ranks, job, tmp_path)
    assert max(seen.whole for seen in divided) < size / 4  # what is gathered for a layer or two
    assert max(seen.peak for seen in divided) < size
    assert min(seen.whole for seen in whole) >= size


def trained_both_ways(ranks: Ranks, job: Job, folder: Path) -> tuple[list[Seen], list[Seen]]:
    """Train a stage on a backbone that is cut up while it is loaded, and on one that is loaded whole, to equal bits.

    Returns:
        What the ranks of the one and of the other saw.
    """
    seen, trained = [], []
    for function, name in ((observe, "divided"), (_observe_whole, "whole")):
        (folder / name).mkdir()
        seen.append(ranks.run(function, job, str(folder / name), timeout_s=250.0))
        trained.append(Trained.read(folder / name))
    assert trained[0].difference(trained[1]) == {"weights": 0, "metrics": 0, "mask_bits": 0}
    return seen[0], seen[1]


def _observe_whole(rank: int, world: int, job: Job, out: str) -> Seen:
    return _undivided(observe, rank, world, job, out)


def _undivided(function: Any, *args: Any) -> Any:
    module: Any = train
    before = module.partitions
    module.partitions = lambda config, world: False
    try:
        return function(*args)
    finally:
        module.partitions = before


def test_plugins_alone_are_saved_by_the_ranks_that_own_them_and_loaded_on_any_number(
    ranks: Ranks, run: Run, tmp_path: Path
) -> None:
    job = second(run)
    (tmp_path / "out").mkdir()
    ranks.run(_train, job, str(tmp_path / "out"), timeout_s=250.0)
    stored = ShardedWeights(tmp_path / "out")
    model = _started(job)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(stored) == names
    backbone = {id(parameter) for parameter in backbone_of(model)}
    assert not any(id(model.get_parameter(name)) in backbone for name in names)
    files = sorted((tmp_path / "out").glob("trainable-*.safetensors"))
    assert len(files) == 2
    total = sum(stored[name].numel() for name in names) * 4
    for path in files:
        assert path.stat().st_size < total / 2 * 1.3 + 64 * 1024  # headers name every piece


def _started(job: Job) -> nn.Module:
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    return learner.model


def _train(rank: int, world: int, job: Job, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


def test_in_bfloat16_a_divided_backbone_is_rounded_as_a_whole_one(ranks: Ranks, run: Run, tmp_path: Path) -> None:
    job = second(run)
    job = replace(job, model=job.model.model_copy(update={"dtype": "bfloat16"}))
    found = []
    for name, function in (("divided", _train), ("whole", _train_whole)):
        (tmp_path / name).mkdir()
        ranks.run(function, job, str(tmp_path / name), timeout_s=250.0)
        found.append(Trained.read(tmp_path / name))
    assert found[0].difference(found[1]) == {"weights": 0, "metrics": 0, "mask_bits": 0}


def _train_whole(rank: int, world: int, job: Job, out: str) -> None:
    _undivided(_train, rank, world, job, out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backbone_that_is_trained_is_cut_up_too(ranks: Ranks, trained_book: Run, dtype: str, tmp_path: Path) -> None:
    """Loaded, with the weights of the task before, and trained: never whole, and the same bits as one loaded whole."""
    job = second(trained_book)
    job = replace(job, model=job.model.model_copy(update={"dtype": dtype}))
    size = backbone_bytes(job)
    divided, whole = trained_both_ways(ranks, job, tmp_path)
    assert max(seen.built for seen in divided) < 0.75 * size  # a half, and the largest parameter
    assert max(seen.whole for seen in divided) < size / 2
    assert min(seen.built for seen in whole) >= size
