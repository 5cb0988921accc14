"""File rendezvous of the ranks of a gang on one machine, in a folder that other users cannot enter.

Ray Train's default rendezvous is a port of rank 0 that listens on every interface without authentication.
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
    """Process group of torch with a file rendezvous in a folder."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["_FileBackend"]:
        """The backend that sets up the process group."""
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set up the process group with a new file, since the previous one may have entries of a dead gang."""
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
