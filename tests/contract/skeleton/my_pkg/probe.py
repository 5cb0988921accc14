"""Settings and plan: imported by the driver, so no torch here."""

from cl_dist.methods.base import Capabilities, Method, MethodConfig, plan_sequential


class ProbeConfig(MethodConfig):
    """Settings of the probe; the inherited `name` takes whatever name the run file uses."""

    scale: float = 1.0
    """Factor on the logits."""


METHOD = Method(
    config=ProbeConfig,
    plan=plan_sequential,
    learners={"classifier": "my_pkg.probe_learner:Probe"},
    about="a linear head per task on a frozen backbone",
    capabilities=Capabilities(freezes_backbone=True, isolated=True, takes_partitioned=True, takes_quantized=True),
    version="1",
)
