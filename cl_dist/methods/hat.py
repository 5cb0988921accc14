"""HAT on adapters: task masks over two gated layers behind every sub-block of a frozen backbone.

Source: Serrà et al. 2018 (HAT), "Overcoming catastrophic forgetting with hard attention to the task", on adapters as
Ke et al. 2021 (CTR) use it as a baseline. The mathematics is in models/gates and models/plugin; learners/hat trains.
"""

from math import ceil
from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Capabilities, Method, MethodConfig, plan_sequential
from cl_dist.models.config import MaskShape


class MaskedConfig(MethodConfig, MaskShape):
    """Settings of every method with task masks; the sizes are those of MaskShape."""

    sparsity: float = Field(0.75, ge=0)
    """Weight of the term that keeps units free for later tasks."""
    gate_lr: float = Field(0.02, gt=0)
    """Learning rate of the gate embeddings, which are drawn from N(mask_mean, mask_std): at the rate of weights they
    would hardly change sign within a task."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of the task's head; None takes train.lr."""

    @property
    def gate_steps(self) -> int:
        """Optimizer steps in which a gate embedding can move by mask_std, the spread of its initial values.

            steps = 2 * mask_std / gate_lr

        AdamW moves an embedding by at most about the learning rate in a step, and the rate falls linearly to 0.
        """
        return ceil(2 * self.mask_std / self.gate_lr)


START_ROWS = 128
"""Train rows that decide which earlier task is the nearest."""


def masked_capabilities(config: MaskedConfig, *, isolated: bool = True, slow_parts: str = "masks") -> Capabilities:
    """Return what a method with task masks can do: to find the nearest task it reads the backbone before training."""
    is_nearest = config.inherit == "nearest"
    return Capabilities(
        freezes_backbone=True,
        isolated=isolated,
        takes_partitioned=not is_nearest,
        takes_quantized=True,
        start_rows=START_ROWS if is_nearest else 0,
        slow_steps=config.gate_steps,
        slow_parts=slow_parts,
    )


class HatConfig(MaskedConfig):
    """Settings of HAT."""

    name: Literal["hat"] = "hat"


METHOD = Method(
    config=HatConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.learners.hat:Hat"},
    about="task masks over adapters in a frozen backbone",
    version="2",
    capabilities=lambda config, model: masked_capabilities(config),
)
