"""CTR: CL-plugins with capsules, transfer routing and task masks in a frozen backbone.

Source: Ke et al. 2021, "Achieving Forgetting Prevention and Knowledge Transfer in Continual Learning", NeurIPS.
The mathematics is in models/gates, models/capsules and models/plugin; learners/ctr trains.
"""

from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Capabilities, Method, TaskSequence, sequential_stages
from cl_dist.methods.hat import MaskedConfig, masked_capabilities
from cl_dist.models.config import ModelConfig, PluginShape
from cl_dist.stage import Stage


class CtrConfig(MaskedConfig, PluginShape):
    """Settings of CTR; the sizes of a plugin are those of PluginShape."""

    name: Literal["ctr"] = "ctr"
    mode: Literal["no_forgetting", "backward_transfer"] = "no_forgetting"
    """no_forgetting: everything an earlier task uses is frozen, so its logits stay bit-equal. backward_transfer (the
    paper): earlier capsules go on learning through open gates, so that earlier tasks may gain or lose."""
    sharing_lr: float | None = Field(None, gt=0)
    """Learning rate of knowledge sharing: capsules, routing rows, router and up-projection. None takes train.lr."""
    noise_share: float = Field(1.0, gt=0, le=1)
    """Share of a round after which the routers' noise is 0; until then it falls linearly. Below 1 the parts that follow
    the gates train on decided gates for the rest of the round."""


def plan(config: CtrConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train on the task, then score all seen ones, and the new one also without knowledge sharing.

    Besides the whole module the capsules of earlier tasks alone are switched off (earlier), and gates that a router
    decides are replaced by coins (gates): what the own capsule adds is capacity, not transfer.
    """
    train, score = sequential_stages(tasks, t)
    earlier = ("earlier", "gates") if config.routing == "transfer" else ("earlier",)
    without = ("sharing", *(earlier if t else ())) if config.share else ()
    return [train, score.model_copy(update={"without": without})]


def capabilities(config: CtrConfig, model: ModelConfig) -> Capabilities:
    """Return what CTR can do: with backward transfer or a shared router earlier tasks go on changing."""
    shared = config.share and config.routing_scope == "shared"
    is_routed = config.share and config.routing == "transfer"
    parts = "masks and routers" if is_routed else "masks"
    return masked_capabilities(config, isolated=config.mode == "no_forgetting" and not shared, slow_parts=parts)


METHOD = Method(
    config=CtrConfig,
    plan=plan,
    learners={"classifier": "cl_dist.learners.ctr:Ctr"},
    about="capsule CL-plugins with transfer routing and task masks in a frozen backbone",
    version="2",
    capabilities=capabilities,
)
