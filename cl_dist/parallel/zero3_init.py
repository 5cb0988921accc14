"""Partitioning of models while they are loaded: under ZeRO-3 no rank ever has a full model."""

from collections.abc import Iterator
from contextlib import contextmanager

from cl_dist.parallel.config import EngineConfig, offloaded
from cl_dist.parallel.engine import start_deepspeed
from cl_dist.parallel.world import World


def partitions(config: EngineConfig, world: World) -> bool:
    """Return whether an engine partitions the parameters of a model in training over the ranks."""
    return config.engine == "deepspeed" and config.zero_stage == 3 and world.size > 1


@contextmanager
def partitioned_init(config: EngineConfig, world: World) -> Iterator[None]:
    """Make `from_pretrained` of transformers partition each module's float32 parameters on creation.

    They are then filled one module at a time from the file as rank 0 sees it. All ranks load the same models.
    """
    start_deepspeed(world)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **offloaded(config)},
    }
    config_ref = HfDeepSpeedConfig(settings)  # type: ignore[no-untyped-call]  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del config_ref
