"""LoRA per task, by peft: low-rank updates and a head per task in a frozen backbone.

Source: Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
"""

from typing import Literal

from cl_dist.methods.base import Capabilities, Method, MethodConfig, plan_sequential
from cl_dist.models.config import LoraShape


class LoraConfig(MethodConfig, LoraShape):
    """Settings of LoRA, named as in peft."""

    name: Literal["lora"] = "lora"


METHOD = Method(
    config=LoraConfig,
    plan=plan_sequential,
    learners={"classifier": "cl_dist.learners.lora:Lora"},
    about="low-rank updates of its own for every task, through peft, in a frozen backbone",
    capabilities=Capabilities(freezes_backbone=True, isolated=True, takes_partitioned=True),
)
