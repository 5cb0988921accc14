"""EWC: fine-tuning under quadratic penalties, weighted by the Fisher information of earlier tasks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_dist.learners.finetune import Finetune
from cl_dist.methods.ewc import EwcConfig
from cl_dist.models.classifier import Batch, cross_entropy
from cl_dist.parallel.gradients import Penalty, QuadraticPenalty
from cl_dist.parallel.world import World


class Ewc(Finetune):
    """Fine-tunes under the penalty and measures each task's Fisher information at its end."""

    config: EwcConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fisher: dict[str, Tensor] = {}

    def penalties(self) -> Mapping[str, Penalty]:
        """Pull weights that earlier tasks are sensitive to towards their values at the start of this one."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            name: QuadraticPenalty(strength=self.config.strength * fisher, anchor=trained[name].detach().clone())
            for name, fisher in self._fisher.items()
            if name in trained
        }

    def end_task(self, masters: Mapping[str, Tensor], rows: Iterable[Batch]) -> None:
        """Add this task's Fisher information."""
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

    def report_info(self) -> dict[str, Any]:
        """Return the mean importance of the weights."""
        total = sum(float(fisher.sum()) for fisher in self._fisher.values())
        return {"fisher_mean": total / max(1, sum(fisher.numel() for fisher in self._fisher.values()))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the importances; their anchor is the model itself."""
        return {f"fisher.{name}": fisher for name, fisher in self._fisher.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the importances."""
        self._fisher = {name.removeprefix("fisher."): fisher for name, fisher in state.items()}
