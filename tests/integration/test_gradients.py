"""Penalties and gradient transforms of a method whose terms are matrix products, on one worker and under ZeRO.

The method keeps its low-rank factor away from the subspaces of earlier tasks by sum_i ||A_t A_i'||^2 / 2, and projects
the gradient of its output factor onto the complement of a subspace. Neither is elementwise.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.contract.ranks import Ranks
from cl_dist.errors import EmptiedParameterError
from cl_dist.learners import lora
from cl_dist.learners.base import Loss, Progress
from cl_dist.models.classifier import Batch
from cl_dist.parallel import params
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.gradients import GradientTransform, Penalty
from cl_dist.run import Run
from cl_dist.stages import train
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests import parity

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),  # the first test also starts the ranks, on a machine that may be busy
]


@dataclass(frozen=True)
class Apart:
    """strength / 2 * ||A earlier'||^2: the gradient of A (r, H) is strength * A earlier' earlier."""

    earlier: Tensor
    """(n r, H): the factors of all earlier tasks."""
    strength: float

    def gradient(self, value: Tensor) -> Tensor:
        earlier = self.earlier.to(value)
        return self.strength * (value @ earlier.T) @ earlier

    def tensors(self) -> Iterable[Tensor]:
        return [self.earlier]


@dataclass(frozen=True)
class Projected:
    """Takes the span of an orthonormal basis (H, k) out of the rows of a gradient's transpose."""

    basis: Tensor
    decay: bool = False

    def apply(self, gradient: Tensor) -> Tensor:
        basis = self.basis.to(gradient)
        return gradient - basis @ (basis.T @ gradient)

    def frozen(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        return None


class ToyOrthogonalLora(lora.Lora):
    """LoRA per task whose factors A of different tasks are orthogonal to each other."""

    def penalties(self) -> Mapping[str, Penalty]:
        named, task = dict(self.model.named_parameters()), len(self.num_labels) - 1
        found = {}
        for name in named:
            if f".lora_A.task{task}." in name and task:
                earlier = [named[name.replace(f"task{task}", f"task{u}")].detach() for u in range(task)]
                found[name] = Apart(torch.cat(earlier).clone(), strength=3.0)
        return found

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        generator = torch.Generator().manual_seed(0)
        return {
            name: Projected(torch.linalg.qr(torch.randn(parameter.shape[0], 3, generator=generator))[0])
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and ".lora_B." in name
        }


class ReadsOutside(lora.Lora):
    """A regularizer that reads a parameter after the forward pass, as the reference code of O-LoRA does."""

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        found = super().loss(model, batch, progress)
        factor = next(p for n, p in self.model.named_parameters() if p.requires_grad and ".lora_A." in n)
        return replace(found, regularizers={"norm": factor.square().sum()})


class Recorder(nn.Module):
    """A norm that records a term of its own weight in its forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.full((32,), 0.5))

    def forward(self, x_BLH: Tensor) -> Tensor:
        self.term = self.gain.square().sum()
        return self.inner(x_BLH) * (1 + self.gain)


class ReadsInside(lora.Lora):
    """The same kind of term, recorded in the forward pass."""

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        model = super().build(backbone, task)
        untyped: Any = backbone
        untyped.embeddings.LayerNorm = Recorder(untyped.embeddings.LayerNorm)
        return model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        super().start_task(task, tasks)
        self._recorder.gain.requires_grad_(True)

    @property
    def _recorder(self) -> Recorder:
        return next(module for module in self.model.modules() if isinstance(module, Recorder))

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        found = super().loss(model, batch, progress)
        return replace(found, regularizers={"norm": 0.1 * self._recorder.term})


LEARNERS = {"orthogonal": ToyOrthogonalLora, "outside": ReadsOutside, "inside": ReadsInside}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return parity.run(tmp_path_factory.mktemp("gradients"), "lora")


def second(run: Run, **engine: Any) -> Job:
    """Return the job of the second task; ZeRO-3 partitions tiny parameters too."""
    settings = EngineConfig(persistence_threshold=0, **engine)
    return replace(run.job(run.stage(parity.SECOND)), engine=settings)


def train_as(rank: int, world: int, job: Job, out: str, learner: str, fault: str = "") -> None:
    """Train with a learner of this file in the place of LoRA's."""
    own, add = lora.Lora, params.add_gradient
    if fault == "piece":  # the penalty gets the values that the forward pass left, as `parameter.data` would give them
        params.add_gradient = lambda parameter, gradient, rank: add(parameter, lambda whole: gradient(whole * 0), rank)
    lora.Lora = LEARNERS[learner]  # type: ignore[misc]
    try:
        train.run(job, Path(out), lambda event: None)
    finally:
        lora.Lora, params.add_gradient = own, add  # type: ignore[misc]


def here(run: Run, out: Path, learner: str) -> dict[str, Tensor]:
    out.mkdir()
    train_as(0, 1, second(run, engine="torch"), str(out), learner)
    return dict(ShardedWeights(out))


def on(ranks: Ranks, run: Run, out: Path, learner: str, zero_stage: int, fault: str = "") -> dict[str, Tensor]:
    out.mkdir()
    ranks.run(train_as, second(run, zero_stage=zero_stage, micro_batch=8), str(out), learner, fault, timeout_s=200.0)
    return dict(ShardedWeights(out))


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def overlap(run: Run, weights: dict[str, Tensor]) -> float:
    """Return the mean of ||A_1 A_0'||^2 over the layers."""
    first = ShardedWeights(run.ledger.path(parity.SECOND.model_copy(update={"task": 0})))
    names = [name for name in weights if ".lora_A.task1." in name]
    assert names
    return sum(float((weights[n] @ first[n.replace("task1", "task0")].T).square().sum()) for n in names) / len(names)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_matrix_valued_penalties_and_projections_train_the_same_under_zero(
    ranks: Ranks, run: Run, tmp_path: Path, zero_stage: int
) -> None:
    expected = here(run, tmp_path / "here", "orthogonal")
    found = on(ranks, run, tmp_path / "ranks", "orthogonal", zero_stage)
    assert difference(found, expected) <= 1e-5


def test_the_penalty_separates_the_factors(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    train.run(second(run, engine="torch"), tmp_path / "plain", lambda event: None)
    plain = overlap(run, dict(ShardedWeights(tmp_path / "plain")))
    apart = overlap(run, here(run, tmp_path / "apart", "orthogonal"))
    assert apart < 0.7 * plain


def test_a_penalty_that_gets_other_values_is_noticed(ranks: Ranks, run: Run, tmp_path: Path) -> None:
    expected = here(run, tmp_path / "here", "orthogonal")
    found = on(ranks, run, tmp_path / "ranks", "orthogonal", 3, fault="piece")
    assert difference(found, expected) > 1e-4


def test_a_regularizer_that_reads_an_emptied_parameter_is_refused_under_zero_3(
    ranks: Ranks, run: Run, tmp_path: Path
) -> None:
    here(run, tmp_path / "here", "outside")  # one worker has the parameter whole
    expected = r"reads the parameter '.*lora_A.task1.*' outside the model's forward pass.*penalties\(\)"
    with pytest.raises(EmptiedParameterError, match=expected):
        on(ranks, run, tmp_path / "ranks", "outside", 3)


def test_a_regularizer_that_the_forward_pass_records_trains_the_same_under_zero_3(
    ranks: Ranks, run: Run, tmp_path: Path
) -> None:
    expected = here(run, tmp_path / "here", "inside")
    found = on(ranks, run, tmp_path / "ranks", "inside", 3)
    gains = [name for name in found if name.endswith("gain")]
    assert gains
    assert float(found[gains[0]].sub(0.5).abs().max()) > 1e-3  # it has moved
    assert difference(found, expected) <= 1e-5
