"""EWC: one model for all tasks, held back where earlier tasks' losses were sensitive.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"; with one running sum of
importances and one anchor, as in Schwarz et al. 2018 (online EWC):
    penalty = strength / 2 * sum_i F_i (w_i - w*_i)^2;   F <- decay * F + mean over rows of (d log p(y | x) / d w)^2
F is the empirical Fisher information: squares of single rows' gradients at the rows' own labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cl_dist.methods.base import Method, plan_sequential
from cl_dist.methods.finetune import Finetune, TunedConfig

if TYPE_CHECKING:
    from torch import Tensor

    from cl_dist.models.classifier import Batch
    from cl_dist.parallel.engine import Pull


class EwcConfig(TunedConfig):
    """Settings of EWC."""

    name: Literal["ewc"] = "ewc"
    strength: float = Field(5000.0, ge=0)
    """Weight of the penalty."""
    decay: float = Field(1.0, ge=0, le=1)
    """How much of the earlier tasks' importance is kept at each task; 1 adds them up."""


class Ewc(Finetune):
    """Fine-tunes under the penalty and measures each task's Fisher information at its end."""

    config: EwcConfig
    end_rows: ClassVar[int] = 200
    takes_partitioned = False  # it pulls whole weights back to what they were

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fisher: dict[str, Tensor] = {}

    def pulls(self) -> Mapping[str, Pull]:
        """Hold what earlier tasks need near its value at the start of this one."""
        from cl_dist.parallel.engine import Pull

        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            name: Pull(strength=self.config.strength * fisher, anchor=trained[name].detach().clone())
            for name, fisher in self._fisher.items()
            if name in trained
        }

    def end_task(self, masters: Mapping[str, Tensor], rows: Iterable[Batch]) -> None:
        """Add this task's Fisher information."""
        import torch

        from cl_dist.models.classifier import cross_entropy
        from cl_dist.parallel.world import World

        world = World.current()
        # Heads belong to one task each, so no later task can move them.
        shared = {n: p for n, p in self.model.named_parameters() if p.requires_grad and not n.startswith("heads.")}
        squares = {name: torch.zeros_like(parameter) for name, parameter in shared.items()}
        count = torch.zeros((), device=world.device)
        for batch in rows:
            loss = cross_entropy(self.model(batch), batch).sum()
            for square, grad in zip(squares.values(), torch.autograd.grad(loss, list(shared.values())), strict=True):
                square += grad.square()
            count += 1
        total = world.add(count)
        for name, square in squares.items():
            new = (world.add(square) / total).cpu()
            self._fisher[name] = new + self.config.decay * self._fisher.get(name, torch.zeros_like(new))

    def facts(self) -> dict[str, Any]:
        """Return the mean importance of the weights."""
        total = sum(float(fisher.sum()) for fisher in self._fisher.values())
        return {"fisher_mean": total / max(1, sum(fisher.numel() for fisher in self._fisher.values()))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the importances; their anchor is the model itself."""
        return {f"fisher.{name}": fisher for name, fisher in self._fisher.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the importances."""
        self._fisher = {name.removeprefix("fisher."): fisher for name, fisher in state.items()}


METHOD = Method(
    config=EwcConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.methods.ewc:Ewc"},
    about="one model, pulled back where earlier tasks' losses were sensitive (online EWC)",
    penalises=True,
)
