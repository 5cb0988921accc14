"""Which rank holds what of a CTR model under ZeRO, on two gloo ranks; and the guard over what must not move."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_dist.contract.ranks import Ranks
from cl_dist.data.classify import ClassifyRows
from cl_dist.errors import ProtectionError
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel import engine as engines
from cl_dist.parallel import params
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.world import World
from cl_dist.run import Run
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.prefetch import Split
from cl_dist.stages.schedule import Schedule
from cl_dist.stages.stage_job import Job, task_data
from tests import parity

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),  # the first test also starts the ranks, on a machine that may be busy
]


@dataclass(frozen=True)
class Held:
    """What one rank holds, in elements, by parameter."""

    sizes: dict[str, int]
    trained: dict[str, int]
    """Pieces of the float32 masters that are the rank's own."""
    moments: int
    """First moments of AdamW."""
    partitioned: dict[str, int]
    """ZeRO-3: the rank's piece of every parameter, frozen ones included."""
    whole: tuple[str, ...]
    """ZeRO-3: parameters that stay whole on every rank."""
    forwards: int
    """How often DeepSpeed's wrapper was called for the one forward pass in training."""


def hold(rank: int, world: int, job: Job) -> Held:
    learner = build_learner(job)
    learner.start_task(job.stage.task, (job.stage.task,))
    split = Split.of(job, World.current())
    engine = train._engine(job, learner, learner.gradient_transforms(), {}, Schedule(10, 10, 10), split)
    rows = ClassifyRows(load_tokenizer(job.model), 16)
    data = task_data(job, job.stage.task)
    rows.add(job.stage.task, data, data.train)
    own: Any = engine
    forwards: list[int] = []
    own._engine.register_forward_hook(lambda *args: forwards.append(1))
    loss = learner.loss(engine, rows.batch(range(split.micro)), Schedule(10, 10, 10).at(5))
    engine.backward(loss.per_example["ce"].sum(), torch.stack(list(loss.regularizers.values())).sum())
    engine.step()
    named: dict[str, Any] = dict(engine.module.named_parameters())
    optimizer = own._engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    held = Held(
        sizes={name: getattr(p, "ds_numel", p.numel()) for name, p in named.items()},
        trained={name: params.local(p, rank)[0].numel() for name, p in named.items() if p.requires_grad},
        moments=sum(state["exp_avg"].numel() for state in states),
        partitioned={name: p.ds_tensor.numel() for name, p in named.items() if hasattr(p, "ds_id")},
        whole=tuple(name for name, p in named.items() if getattr(p, "ds_persist", False)),
        forwards=len(forwards),
    )
    engine.close()
    return held


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return parity.run(tmp_path_factory.mktemp("sharding"), "ctr")


def second(run: Run, **engine: Any) -> Job:
    return replace(run.job(run.stage(parity.SECOND)), engine=EngineConfig(**engine))


def is_plugin(name: str) -> bool:
    return any(part in name for part in (".sharing.", ".fc1.", ".fc2.", ".gate"))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_masters_and_moments_of_plugins_are_divided_among_the_ranks(ranks: Ranks, run: Run, zero_stage: int) -> None:
    held: list[Held] = ranks.run(hold, second(run, zero_stage=zero_stage), timeout_s=120.0)
    total = sum(held[0].sizes[name] for name in held[0].trained)
    assert sum(sum(each.trained.values()) for each in held) == total
    for each in held:
        assert sum(each.trained.values()) <= total / 2 * 1.05
        assert each.moments <= total / 2 * 1.05
    assert sum(each.moments for each in held) >= total


def test_without_zero_every_rank_holds_every_master(ranks: Ranks, run: Run) -> None:
    held: list[Held] = ranks.run(hold, second(run, zero_stage=0), timeout_s=120.0)
    for each in held:
        assert each.moments == sum(each.trained.values()) == sum(each.sizes[name] for name in each.trained)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_forward_pass_in_training_goes_through_deepspeeds_wrapper(ranks: Ranks, run: Run, zero_stage: int) -> None:
    held: list[Held] = ranks.run(hold, second(run, zero_stage=zero_stage), timeout_s=120.0)
    assert [each.forwards for each in held] == [1, 1]


def test_zero_3_partitions_every_plugin_tensor_frozen_old_capsules_included(ranks: Ranks, run: Run) -> None:
    held: list[Held] = ranks.run(hold, second(run, zero_stage=3), timeout_s=120.0)
    plugins = {name: size for name, size in held[0].sizes.items() if is_plugin(name)}
    assert any(".capsule0_weight" in name and name not in held[0].trained for name in plugins)
    for name, size in plugins.items():
        pieces = [each.partitioned[name] for each in held]
        assert size <= sum(pieces) < size + len(held), name
        assert max(pieces) == -(-size // 2), name
    assert all(each.whole == () for each in held)


def test_deepspeeds_threshold_would_keep_plugins_whole_on_every_rank(ranks: Ranks, run: Run) -> None:
    held: list[Held] = ranks.run(hold, second(run, zero_stage=3, persistence_threshold=10**9), timeout_s=120.0)
    assert {name for name in held[0].trained if is_plugin(name)} <= set(held[0].whole)


def train_with(rank: int, world: int, job: Job, out: str, fault: str) -> None:
    """Train with a fault planted, under the guard."""
    groups, attach, step = engines.Optimizing.groups, engines.attach, engines.DeepSpeedEngine.step
    if fault == "decay":  # on weights whose gradient is masked

        def decayed(self: engines.Optimizing, model: nn.Module) -> list[dict[str, Any]]:
            return [group | {"weight_decay": 0.1} for group in groups(self, model)]

        engines.Optimizing.groups = decayed  # type: ignore[method-assign]
    if fault == "unmasked":
        engines.attach = lambda model, transforms: None
    if fault == "capsule":  # an old capsule is changed between steps

        def shaken(self: engines.DeepSpeedEngine) -> None:
            step(self)
            for name, parameter in self.module.named_parameters():
                if ".capsule0_weight0" in name:
                    getattr(parameter, "ds_tensor", parameter.data).mul_(1.0 + 1e-6)

        engines.DeepSpeedEngine.step = shaken  # type: ignore[method-assign]
    try:
        train.run(job, Path(out), lambda event: None)
    finally:
        engines.Optimizing.groups = groups  # type: ignore[method-assign]
        engines.attach = attach
        engines.DeepSpeedEngine.step = step  # type: ignore[method-assign]


FAULTS: Mapping[str, str] = {"decay": "fc1.weight", "unmasked": "fc1.bias", "capsule": "capsule0_weight0"}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_guard_lets_an_honest_training_pass(ranks: Ranks, run: Run, tmp_path: Path, zero_stage: int) -> None:
    job = second(run, zero_stage=zero_stage, verify_protection_every=1)
    ranks.run(train_with, job, str(tmp_path), "", timeout_s=120.0)
    assert (tmp_path / "train.json").exists()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_names_what_has_moved(ranks: Ranks, run: Run, tmp_path: Path, zero_stage: int, fault: str) -> None:
    job = second(run, zero_stage=zero_stage, verify_protection_every=3)
    with pytest.raises(ProtectionError, match=rf"step [36]: .*{FAULTS[fault]}") as caught:
        ranks.run(train_with, job, str(tmp_path), fault, timeout_s=120.0)
    assert "report it" in str(caught.value)
    assert not list(tmp_path.iterdir())
