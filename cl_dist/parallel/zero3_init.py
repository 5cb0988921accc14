"""Models that are cut up over the ranks while they are loaded: under ZeRO-3 no rank ever holds a whole one."""

from collections.abc import Iterator
from contextlib import contextmanager

from cl_dist.parallel.config import EngineConfig, offloaded
from cl_dist.parallel.engine import start_deepspeed
from cl_dist.parallel.world import World


def partitions(config: EngineConfig, world: World) -> bool:
    """Return whether an engine cuts the parameters of a model in training up over the ranks."""
    return config.engine == "deepspeed" and config.zero_stage == 3 and world.size > 1


@contextmanager
def partitioned_init(config: EngineConfig, world: World) -> Iterator[None]:
    """Have `from_pretrained` of transformers cut up each module's parameters, in float32, as soon as they exist.

    They are then filled one module at a time, from the first rank's view of the file. All ranks load the same models.
    """
    start_deepspeed(world)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **offloaded(config)},
    }
    held = HfDeepSpeedConfig(settings)  # type: ignore[no-untyped-call]  # transformers keeps a weak reference alone
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del held
