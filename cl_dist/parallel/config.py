"""Engine settings: how a Train stage is distributed over workers; torch-free."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cl_dist.config import Section

BUCKET = 500_000_000
"""Largest size, in elements, of ZeRO-2/3's gradient reduction buffer: DeepSpeed's default."""


class ProfileConfig(Section):
    """A torch.profiler trace of some optimizer steps of every Train stage, per rank, in <run folder>/profile."""

    steps: tuple[int, int]
    """[first, last]: records from the moment when the stage has done `first` optimizer steps until it has done `last`;
    [10, 14] records four steps, the eleventh to the fourteenth. A few are enough: traces are large."""

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        first, last = self.steps
        if not 0 <= first < last:
            raise ValueError(f"steps=[{first}, {last}]: expected 0 <= first < last, such as [10, 14]")
        return self


class EngineConfig(Section):
    """Engine settings of a gang of workers. None of them changes a result beyond float rounding."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: one worker, float32, no ZeRO; the reference for all other settings."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates everything, 1 partitions optimizer states, 2 gradients too, 3 parameters too."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows per worker and forward pass; auto uses its full share of the global batch, up to 32."""
    persistence_threshold: int = Field(0, ge=0)
    """ZeRO-3 does not partition parameters with fewer elements. DeepSpeed's default of 100,000 would exempt most
    tensors of a plugin: raise it if gathering them costs more than the memory is worth."""
    activation_checkpointing: bool = False
    """Save only the inputs of the backbone's layers in the forward pass and recompute the rest in the backward pass:
    about a third more time for a fraction of the activations."""
    offload: Literal["optimizer", "all"] | None = None
    """State that ZeRO offloads to the host's memory. optimizer: float32 weights, moments and their update (stages 1-3);
    all: also the parameters, which are moved to the device a few layers at a time (stage 3)."""
    offload_folder: str | None = None
    """With `offload: all`, store parameters in files below this folder, which should be on an NVMe disk of each node;
    partitions of less than 1 MB stay in memory. Needs libaio, a compiler at the first start, and locked memory
    (`ulimit -l`) for the buffers listed by `plan`."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes between two checkpoints of a Train stage; 0 saves only when the run is stopped (SIGTERM, Ctrl-C)."""
    checkpoint_steps: int = Field(0, ge=0)
    """Optimizer steps between two checkpoints, in addition to checkpoint_minutes; 0 disables it."""
    checkpoint_async: bool = True
    """Write checkpoints in the background, from a copy in the host's memory of 12 bytes per trained parameter of a
    rank. False copies and writes a third of it at a time, and training waits."""
    verify_protection_every: int = Field(0, ge=0)
    """Optimizer steps between two checks that no frozen or protected entry has changed by a bit, which stop the run
    if one has; 0 disables the checks."""
    profile: ProfileConfig | None = None
    """Record optimizer steps with torch.profiler: {steps: [10, 14]}. Open the traces with https://ui.perfetto.dev."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        stages = {None: (0, 1, 2, 3), "optimizer": (1, 2, 3), "all": (3,)}[self.offload]
        if self.zero_stage not in stages or (self.offload and self.engine == "torch"):
            known = " or ".join(map(str, stages))
            raise ValueError(f"offload: {self.offload} needs engine: deepspeed and zero_stage: {known}")
        if self.offload_folder is not None and self.offload != "all":
            raise ValueError("offload_folder needs offload: all")
        return self


def buffer_bounds(total: int, trained: int, largest: int) -> dict[str, int]:
    """Return DeepSpeed's buffer sizes in elements for the size of a model, at most its defaults.

    The defaults suit models of billions of parameters: ZeRO-3 would never release a smaller model once it has been
    gathered, and every rank would allocate a buffer of 5e8 gradients, even if few parameters are trained.

    Args:
        total: Elements of the model.
        trained: Elements of its trained parameters.
        largest: Elements of its largest parameter.
    """
    share = max(largest, total // 8)
    return {
        "reduce_bucket_size": min(BUCKET, max(largest, trained)),
        "stage3_prefetch_bucket_size": min(50_000_000, total // 16),
        "stage3_max_live_parameters": min(1_000_000_000, share),
        "stage3_max_reuse_distance": min(1_000_000_000, share),
    }


LARGE = 10**12
"""Size of a model for which DeepSpeed's defaults apply."""


def deepspeed_settings(
    config: EngineConfig,
    *,
    num_micro: int,
    micro_batch: int,
    clip: float,
    bf16: bool,
    bounds: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the DeepSpeed configuration.

    clip is the maximum gradient norm, 0 to disable clipping; bounds default to those of a large model.
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
            **(buffer_bounds(LARGE, LARGE, LARGE // 100) if bounds is None else bounds),
            **offloaded(config),
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        **({} if config.offload is None else {"zero_force_ds_cpu_optimizer": False}),  # also with offload
    }


def offloaded(config: EngineConfig) -> dict[str, Any]:
    """Return the offload section of the ZeRO configuration."""
    parts: dict[str, Any] = {}
    if config.offload is not None:
        parts["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "all":
        # With files, host copies are temporary and must not stay in torch's cache of pinned blocks.
        parts["offload_param"] = {"device": "cpu", "pin_memory": config.offload_folder is None}
    return parts
