"""Where the ranks of a gang find each other on one machine: in a file, which nobody else can enter.

Ray Train has them meet at a port of rank 0, which listens on every interface and asks nobody who he is.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch.config import (
    TorchConfig,
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


@dataclass
class FileConfig(TorchConfig):
    """Torch's process group over a file of a folder."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["_FileBackend"]:
        """What sets it up."""
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the group up, each time with a file of its own: the last one may hold what a dead gang left."""
        worker_group.execute(_set_torch_distributed_env_vars)
        settings = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": f"file://{backend_config.folder}/meeting-{uuid.uuid4().hex}",
            "timeout_s": backend_config.timeout_s,
        }
        ready = [
            worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **settings)
            for rank in range(len(worker_group))
        ]
        ray.get(ready)
