"""Parameters that lie in files between their uses: DeepSpeed's NVMe offload, with buffers of the size that is needed.

Left to itself, DeepSpeed puts pieces into files as it cuts a model up: in bfloat16 on any device without float16, where
no value can be set any more, and through buffers of 5e8 elements. So they are cut up in memory and moved here.
"""

import os
import platform
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cl_dist.errors import ConfigError

NVME = "nvme"
"""What DeepSpeed calls the place of a piece that lies in a file."""
MEGABYTE = 2**20
"""Pieces of fewer bytes stay in memory, as in DeepSpeed."""
CAP_IPC_LOCK = 14
"""The bit of the capability to lock any amount of memory (capabilities(7))."""


class Files:
    """The files of the pieces that this process owns, in a folder of its own below the one that is given."""

    def __init__(self, folder: str) -> None:
        """Remove what processes of this host that are gone have left there."""
        self.folder = Path(folder) / f"cl-dist-{platform.node()}-{os.getpid()}"
        self._swapper: Any = None
        for other in self.folder.parent.glob(f"{self.folder.name.rpartition('-')[0]}-*"):
            pid = other.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(other, ignore_errors=True)

    def take(self, model: nn.Module, settings: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """Move the pieces of a model that has been cut up into files.

        Those of less than a megabyte stay in memory, and those of parameters that are kept whole.

        Returns:
            What DeepSpeed is told of it: the settings by which the model was cut up, and the files.

        Raises:
            ConfigError: If this process may not lock as much memory as the buffers take.
        """
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

        parameters: list[Any] = list(model.parameters())
        zero, largest = settings["zero_optimization"], max(p.ds_tensor.ds_numel for p in parameters)
        threshold, item = zero["stage3_param_persistence_threshold"], parameters[0].element_size()

        def moves(parameter: Any) -> bool:
            return parameter.ds_numel > threshold and parameter.ds_tensor.ds_numel * item >= MEGABYTE

        count = num_buffers(model, moves)
        trained = sum(p.ds_tensor.ds_numel for p in parameters if p.requires_grad)
        _check_lockable(item * (count * largest + trained))
        place = {"device": NVME, "nvme_path": str(self.folder), "max_in_cpu": 0}
        place |= {"buffer_size": largest, "buffer_count": count}
        nvme_settings = {
            **settings,
            "zero_optimization": {
                **zero,
                "offload_param": {**zero["offload_param"], **place},
                # A piece holds a buffer from its fetching to its release, so none is kept for its next use; and read
                # ahead, what is used twice in DeepSpeed's window would be given two.
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        }
        self._swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(nvme_settings), parameters[0].dtype)
        reserve = self._swapper.reserve_partitioned_swap_space  # which DeepSpeed asks for whole parameters
        self._swapper.reserve_partitioned_swap_space = lambda sizes: reserve([-(-size // ranks) for size in sizes])
        for parameter in parameters:
            parameter.nvme_swapper, piece = self._swapper, parameter.ds_tensor
            if moves(parameter):
                buffer = self._swapper.get_buffer(parameter, piece.ds_numel)
                piece.data = buffer.copy_(piece)
                piece.final_location = NVME
                self._swapper.swap_out_and_release([parameter])
        return nvme_settings

    def close(self) -> None:
        """Remove the files, and free the buffers, which DeepSpeed keeps as long as the process lives."""
        if self._swapper is not None:
            self._swapper.aio_read_handle.free_cpu_locked_tensor(self._swapper.buffers)
            if self._swapper.partitioned_swap_buffer is not None:
                self._swapper.aio_write_handle.free_cpu_locked_tensor(self._swapper.partitioned_swap_buffer)
            self._swapper = None
        shutil.rmtree(self.folder, ignore_errors=True)


def num_buffers(model: nn.Module, lies_in_a_file: Callable[[Any], bool]) -> int:
    """Return how many buffers a step needs: one for each piece that is whole at a time, five at least.

    A module's own parameters are whole while it and what is below it is at work; those of a layer that is computed
    again in the backward pass all together.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def most(module: nn.Module) -> int:
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            return sum(lies_in_a_file(parameter) for parameter in module.parameters())
        own = sum(lies_in_a_file(parameter) for parameter in module.parameters(recurse=False))
        return own + max(map(most, module.children()), default=0)

    return max(5, most(model) + 2)  # what DeepSpeed lets go late


def _check_lockable(size: int) -> None:
    """Raise an error where DeepSpeed's operator would abort the process."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and size > limit and not _may_lock():
        raise ConfigError(
            f"cluster.offload_folder: the buffers for files take {size / 2**20:.0f} MiB of locked memory on each rank, "
            f"and this process may lock {limit / 2**20:.0f} MiB; raise it where the node's Ray is started "
            "(`ulimit -l unlimited`), or leave offload_folder out"
        )


def _may_lock() -> bool:
    """Return whether this process has the capability to lock as much memory as it likes, as root has."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> CAP_IPC_LOCK & 1)


def read(parameter: Any) -> Tensor:
    """Return a copy of a rank's piece of a parameter from its file, or the piece itself where it is in memory."""
    piece: Tensor = parameter.ds_tensor
    if parameter.ds_tensor.final_location != NVME:
        return piece
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    found = piece.data.clone()
    parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    return found
