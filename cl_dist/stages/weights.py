"""Trained weights on disk: each rank writes its partitions, and any number of ranks can read them.

One worker, or ZeRO-0, writes `trainable.safetensors` with full tensors. A gang under ZeRO-1/2/3 writes one
`trainable-<rank>-of-<ranks>.safetensors` per rank: flat partitions, and in the header's metadata ("places") the full
shape and the offset of each.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cl_dist.errors import CheckpointError
from cl_dist.parallel import moments, params
from cl_dist.parallel.engine import Engine
from cl_dist.partition import full_shape

TRAINABLE = "trainable"


class LocalShards:
    """A float32 copy on the CPU of this rank's partitions of an engine's trained weights. Not a collective."""

    def __init__(self, engine: Engine, moment: str | None = None) -> None:
        """Copy the weights, or one of the optimizer's moments."""
        self._world = engine.world
        self._tensors: dict[str, Tensor] = {}
        self._offsets: dict[str, tuple[list[int], int]] = {}
        self._is_sharded = False
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = list(full_shape(parameter))
            piece, start = params.local(parameter, self._world.rank)
            if moment is not None:
                piece, start = moments.local(engine, parameter, moment)
            self._is_sharded |= params.is_managed(parameter)
            piece = piece.detach().flatten()[: max(0, prod(shape) - start)]  # ZeRO-3 pads the last one
            self._tensors[name] = piece.to("cpu", torch.float32, copy=True)
            self._offsets[name] = shape, start

    def save(self, folder: Path) -> None:
        """Write this rank's file and wait for all ranks. A collective."""
        self.write(folder)
        self._world.gather(None)

    def write(self, folder: Path, stem: str = TRAINABLE) -> list[Path]:
        """Write this rank's file, if it has one, and return it. Not a collective."""
        world = self._world
        if self._is_sharded and world.size > 1:
            path = folder / f"{stem}-{world.rank:05d}-of-{world.size:05d}.safetensors"
            save_file(self._tensors, path, metadata={"places": json.dumps(self._offsets)})
        elif world.rank == 0:
            path = folder / f"{stem}.safetensors"
            save_file({n: t.reshape(self._offsets[n][0]) for n, t in self._tensors.items()}, path)
        else:
            return []
        return [path]


class ShardedWeights(Mapping[str, Tensor]):
    """The weights in a folder by name; each is assembled on access.

    Raises:
        CheckpointError: If files are missing, unreadable, or do not cover a parameter.
    """

    def __init__(self, folder: Path | str, stem: str = TRAINABLE) -> None:
        self._folder = Path(folder)
        full = self._folder / f"{stem}.safetensors"
        shards = sorted(self._folder.glob(f"{stem}-*-of-*.safetensors"))
        files = [full] if full.exists() else shards
        if not full.exists() and (not shards or len(shards) != int(shards[0].stem.rpartition("-")[2])):
            expected = f"{len(shards)} of {int(shards[0].stem.rpartition('-')[2])}" if shards else "no"
            raise CheckpointError(f"{folder}: {full.name} does not exist, and {expected} shards of it were found")
        self._files: list[tuple[Any, dict[str, tuple[list[int], int]]]] = []
        self._names: dict[str, None] = {}  # an ordered set
        for path in files:
            try:
                opened: Any = safe_open(path, framework="pt")  # the library's class is untyped
            except Exception as error:  # the library documents no exception type
                raise CheckpointError(f"{path}: cannot be loaded: {error}") from error
            offsets = json.loads((opened.metadata() or {}).get("places", "{}"))
            self._files.append((opened, offsets))
            self._names |= dict.fromkeys(offsets or opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        first, offsets = self._files[0]
        if not offsets:
            full: Tensor = first.get_tensor(name)
            return full
        shape = offsets[name][0]
        flat, covered = torch.empty(prod(shape)), 0
        for opened, pieces in self._files:
            piece, start = opened.get_tensor(name), pieces[name][1]
            flat[start : start + piece.numel()] = piece
            covered += piece.numel()
        if covered != flat.numel():
            raise CheckpointError(f"{self._folder}: {name}: {covered} of {flat.numel()} elements are stored")
        return flat.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
