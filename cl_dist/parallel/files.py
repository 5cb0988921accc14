"""Offload of parameters to files: DeepSpeed's NVMe offload, with buffers of the required size.

By default DeepSpeed writes partitions to files while it partitions a model: in bfloat16 on devices without float16,
after which values cannot be set, and through buffers of 5e8 elements. Here partitions are created in memory first.
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
"""DeepSpeed's location of a partition in a file."""
MEGABYTE = 2**20
"""Partitions of fewer bytes stay in memory, as in DeepSpeed."""
CAP_IPC_LOCK = 14
"""The bit of the capability to lock any amount of memory (capabilities(7))."""


class Files:
    """The files of this process's partitions, in its own subfolder of the given folder."""

    def __init__(self, folder: str) -> None:
        """Remove the files of dead processes of this host."""
        self.folder = Path(folder) / f"cl-dist-{platform.node()}-{os.getpid()}"
        self._swapper: Any = None
        for other in self.folder.parent.glob(f"{self.folder.name.rpartition('-')[0]}-*"):
            pid = other.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(other, ignore_errors=True)

    def take(self, model: nn.Module, settings: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """Move the partitions of a model to files.

        Partitions of less than a megabyte and parameters below the persistence threshold stay in memory.

        Returns:
            The DeepSpeed configuration, extended by the files.

        Raises:
            ConfigError: If this process may not lock enough memory for the buffers.
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
                # A partition occupies a buffer from fetch to release, so none is kept for reuse; and with prefetching,
                # a parameter used twice in DeepSpeed's window would get two buffers.
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        }
        self._swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(nvme_settings), parameters[0].dtype)
        reserve = self._swapper.reserve_partitioned_swap_space  # DeepSpeed passes sizes of full parameters
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
        """Remove the files, and free the buffers, which DeepSpeed never frees."""
        if self._swapper is not None:
            self._swapper.aio_read_handle.free_cpu_locked_tensor(self._swapper.buffers)
            if self._swapper.partitioned_swap_buffer is not None:
                self._swapper.aio_write_handle.free_cpu_locked_tensor(self._swapper.partitioned_swap_buffer)
            self._swapper = None
        shutil.rmtree(self.folder, ignore_errors=True)


def num_buffers(model: nn.Module, lies_in_a_file: Callable[[Any], bool]) -> int:
    """Return the number of buffers for a step: one for each parameter that is gathered at a time, at least five.

    A module's own parameters are gathered while it or a submodule runs; those of a checkpointed layer all together.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def most(module: nn.Module) -> int:
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            return sum(lies_in_a_file(parameter) for parameter in module.parameters())
        own = sum(lies_in_a_file(parameter) for parameter in module.parameters(recurse=False))
        return own + max(map(most, module.children()), default=0)

    return max(5, most(model) + 2)  # margin: DeepSpeed releases some buffers late


def _check_lockable(size: int) -> None:
    """Raise ConfigError if DeepSpeed's operator would abort the process."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and size > limit and not _may_lock():
        raise ConfigError(
            f"cluster.offload_folder: the buffers for files take {size / 2**20:.0f} MiB of locked memory on each rank, "
            f"but this process may lock {limit / 2**20:.0f} MiB; raise the limit for the node's Ray "
            "(`ulimit -l unlimited`), or remove offload_folder"
        )


def _may_lock() -> bool:
    """Return whether this process has the capability to lock any amount of memory, as root has."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> CAP_IPC_LOCK & 1)


def read(parameter: Any) -> Tensor:
    """Return a copy of a rank's partition from its file, or the partition itself if it is in memory."""
    piece: Tensor = parameter.ds_tensor
    if parameter.ds_tensor.final_location != NVME:
        return piece
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    found = piece.data.clone()
    parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    return found
