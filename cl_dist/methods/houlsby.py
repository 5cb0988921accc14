"""Houlsby adapters: bottlenecks, norms and a head per task in a frozen backbone; tasks share no trained weight.

Source: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP". The modules are in models/task_modules.
"""

from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Capabilities, Method, MethodConfig, plan_sequential


class HoulsbyConfig(MethodConfig):
    """Settings of adapters."""

    name: Literal["adapter"] = "adapter"
    size: int = Field(64, gt=0)
    """Width of the bottleneck."""


METHOD = Method(
    config=HoulsbyConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.learners.houlsby:Houlsby"},
    about="bottleneck adapters of its own for every task in a frozen backbone",
    capabilities=Capabilities(freezes_backbone=True, isolated=True, takes_partitioned=True, takes_quantized=True),
)
