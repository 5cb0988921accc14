"""EWC: one model for all tasks, held back where earlier tasks' losses were sensitive.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"; with one running sum of
importances and one anchor, as in Schwarz et al. 2018 (online EWC):
    penalty = strength / 2 * sum_i F_i (w_i - w*_i)^2;   F <- decay * F + mean over rows of (d log p(y | x) / d w)^2
F is the empirical Fisher information: squares of single rows' gradients at the rows' own labels.
"""

from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Capabilities, Method, plan_sequential
from cl_dist.methods.finetune import TunedConfig
from cl_dist.models.config import ModelConfig


class EwcConfig(TunedConfig):
    """Settings of EWC."""

    name: Literal["ewc"] = "ewc"
    strength: float = Field(5000.0, ge=0)
    """Weight of the penalty."""
    decay: float = Field(1.0, ge=0, le=1)
    """How much of the earlier tasks' importance is kept at each task; 1 adds them up."""


def capabilities(config: EwcConfig, model: ModelConfig) -> Capabilities:
    """Return what EWC can do. It copies whole weights as anchors, so it needs a backbone that is not partitioned."""
    return Capabilities(freezes_backbone=config.tune == "head", penalties=True, end_rows=200)


METHOD = Method(
    config=EwcConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.learners.ewc:Ewc"},
    about="one model, pulled back where earlier tasks' losses were sensitive (online EWC)",
    capabilities=capabilities,
)
