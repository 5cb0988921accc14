"""CTR: CL-plugins with capsules, transfer routing and task masks in a frozen backbone.

Source: Ke et al. 2021, "Achieving Forgetting Prevention and Knowledge Transfer in Continual Learning", NeurIPS.
The mathematics is in models/gates, models/capsules and models/plugin; learners/ctr trains.
"""

from typing import Literal

from cl_dist.methods.base import Capabilities, Method, TaskSequence, sequential_stages
from cl_dist.methods.hat import MaskedConfig
from cl_dist.models.config import ModelConfig, PluginShape
from cl_dist.stage import Stage


class CtrConfig(MaskedConfig, PluginShape):
    """Settings of CTR; the sizes of a plugin are those of PluginShape."""

    name: Literal["ctr"] = "ctr"
    mode: Literal["no_forgetting", "backward_transfer"] = "no_forgetting"
    """no_forgetting: everything an earlier task uses is frozen, so its logits stay bit-equal. backward_transfer (the
    paper): earlier capsules go on learning through open gates, so that earlier tasks may gain or lose."""


def plan(config: CtrConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train on the task, then score all seen ones, and the new one also without knowledge sharing."""
    train, score = sequential_stages(tasks, t)
    return [train, score.model_copy(update={"without": ("sharing",)}) if config.share else score]


def capabilities(config: CtrConfig, model: ModelConfig) -> Capabilities:
    """Return what CTR can do: with backward transfer earlier tasks go on changing."""
    return Capabilities(
        freezes_backbone=True,
        isolated=config.mode == "no_forgetting",
        takes_partitioned=True,
        takes_quantized=True,
        slow_steps=config.gate_steps,
        slow_parts="masks and routers" if config.share and config.routing == "transfer" else "masks",
    )


METHOD = Method(
    config=CtrConfig,
    plan=plan,
    learners={"classifier": "cl_dist.learners.ctr:Ctr"},
    about="capsule CL-plugins with transfer routing and task masks in a frozen backbone",
    capabilities=capabilities,
)
