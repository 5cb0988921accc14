"""How a Train stage is spread over workers: the settings of the engine; torch-free."""

from typing import Any, Literal

from pydantic import Field

from cl_dist.config import Section

BUCKET = 500_000_000
"""Most elements of the buffer that ZeRO-2/3 reduce gradients through: DeepSpeed's own value."""


class EngineConfig(Section):
    """What one gang of workers needs to know. None of it may change a result beyond float rounding."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: one worker, float32, no ZeRO: the reference that everything else is compared with."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    micro_batch: int | Literal["auto"] = "auto"
    """Rows a worker holds at once; auto takes its whole share of the global batch, up to 32."""
    persistence_threshold: int = Field(0, ge=0)
    """ZeRO-3 keeps parameters with fewer elements whole on every rank. DeepSpeed's own 100,000 would keep most tensors
    of a plugin: raise it where gathering them costs more than the memory."""
    activation_checkpointing: bool = False
    """Keep the inputs of the backbone's layers alone in the forward pass and compute the rest again in the backward
    pass: about a third more time for a fraction of the activations."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """A Train stage is saved when so much time has passed since it began or was saved; with 0 only when the run is told
    to stop (SIGTERM, Ctrl-C)."""
    checkpoint_steps: int = Field(0, ge=0)
    """It is also saved every so many optimizer steps; 0 leaves it to the clock."""
    checkpoint_async: bool = True
    """Files are written while training goes on, from a copy in the host's memory: 12 bytes for each trained parameter
    of a rank. False copies and writes a third of it at a time, and training waits."""
    verify_protection_every: int = Field(0, ge=0)
    """Compare the bits of what must not move every so many optimizer steps, and stop the run where they differ; 0 never
    does."""


def deepspeed_settings(
    config: EngineConfig, *, num_micro: int, micro_batch: int, clip: float, bf16: bool, trained: int = BUCKET
) -> dict[str, Any]:
    """Return the configuration that DeepSpeed is given.

    clip is the bound of the gradient norm, 0 for none; trained is how many elements the model trains.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": clip,  # DeepSpeed's default is 1.0, not off
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_param_persistence_threshold": config.persistence_threshold,
            "contiguous_gradients": config.zero_stage > 1,
            "reduce_bucket_size": min(BUCKET, trained),  # allocated whole, however small the model
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW
    }
