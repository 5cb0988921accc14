"""Tensors in .safetensors files, read without torch: position, groups of equal shape, and packed masks."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config import Tree
from cl_dist.errors import CheckpointError

WHOLE, PIECES = "trainable.safetensors", "trainable-*-of-*.safetensors"
"""Weights of a Train stage: one file, or one per rank."""
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64"), 64),
}
"""Bits of an element of each type that cl-dist or backbones store."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header of its .safetensors file describes it; for a partitioned tensor, its first part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its bytes in the file."""
    size: int
    """Number of bytes."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a .safetensors file by name: 8 bytes of length, a JSON header, then the tensors' bytes.

    Raises:
        CheckpointError: If the header does not match the file.
    """
    begin, head = _head(path)
    try:
        tensors = {name: _stored(path, begin, name, entry) for name, entry in head.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: no safetensors header: {error!r}") from None
    end, size = begin, path.stat().st_size
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end or tensor.size * 8 != tensor.elements * BITS.get(tensor.dtype, 0):
            raise CheckpointError(f"{path}: damaged: tensor {tensor.name!r} is not where the header says")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{path}: damaged: {size} bytes, {end} according to its header")
    return tensors


def read_weights(folder: Path) -> dict[str, Stored]:
    """Return the trained tensors of a Train stage by name; parts of several ranks count as one tensor.

    Raises:
        CheckpointError: If files are missing or damaged, or do not cover a tensor.
    """
    if (folder / WHOLE).exists():
        return read_header(folder / WHOLE)
    files = sorted(folder.glob(PIECES))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise CheckpointError(f"{folder}: has no {WHOLE}, and {len(files)} parts of it, which are not all")
    whole: dict[str, Stored] = {}
    found: dict[str, int] = {}
    for path in files:
        pieces, metadata = read_header(path), _head(path)[1].get("__metadata__", {})
        for name, (shape, _) in json.loads(metadata.get("places", "{}")).items():
            found[name] = found.get(name, 0) + pieces[name].elements
            size = math.prod(shape) * BITS[pieces[name].dtype] // 8
            whole[name] = Stored(name, pieces[name].dtype, tuple(shape), path, pieces[name].start, size)
    for name, tensor in whole.items():
        if found[name] != tensor.elements:
            raise CheckpointError(f"{folder}: {name}: {found[name]} of {tensor.elements} elements are stored")
    return whole


def _head(path: Path) -> tuple[int, Tree]:
    """Return the offset of the tensors, and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if 8 + length <= path.stat().st_size else b""
    try:
        entries = json.loads(head)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: no safetensors header: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: damaged: no safetensors header: expected an object")
    return 8 + length, entries


def _stored(path: Path, begin: int, name: str, entry: Mapping[str, Any]) -> Stored:
    start, stop = entry["data_offsets"]
    return Stored(name, entry["dtype"], tuple(entry["shape"]), path, begin + start, stop - start)


def groups(tensors: Mapping[str, Stored]) -> list[Tree]:
    """Return the tensors in groups of equal type and shape whose names differ only in numbers."""
    found: dict[tuple[str, str, tuple[int, ...]], list[Stored]] = {}
    for tensor in tensors.values():
        found.setdefault((re.sub(r"\d+", "#", tensor.name), tensor.dtype, tensor.shape), []).append(tensor)
    return [
        {
            "name": _common_name([tensor.name for tensor in alike]),
            "shape": list(shape),
            "dtype": dtype,
            "count": len(alike),
            "bytes": sum(tensor.size for tensor in alike),
        }
        for (_, dtype, shape), alike in sorted(found.items())
    ]


def _common_name(names: Sequence[str]) -> str:
    """Return names that differ in numbers as one, with a * for the numbers that differ."""
    pieces = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)


def masks(tensors: Mapping[str, Stored], facts: Mapping[str, Any] | None) -> Tree | None:
    """Return the number of units that each finished task uses, from packed masks (a bit per unit, a row per task).

    The total number of units comes from the learner's part of train.json; padding bits are 0. None without masks.
    """
    packed = [t for t in tensors.values() if t.dtype == "U8" and len(t.shape) == 2 and re.search(r"\.mask\d*$", t.name)]
    if not packed:
        return None
    rows = [_rows(tensor) for tensor in packed]
    tasks: list[Tree] = []
    before = [0] * len(packed)
    for task in range(min(tensor.shape[0] for tensor in packed)):
        own = [bits[task] for bits in rows]
        used = sum(bits.bit_count() for bits in own)
        new = sum((bits & ~seen).bit_count() for bits, seen in zip(own, before, strict=True))
        before = [bits | seen for bits, seen in zip(own, before, strict=True)]
        tasks.append({"task": task, "used": used, "new": new})
    units = sum(sum(pair) for pair in facts["units"]) if facts and "units" in facts else None
    return {"units": units, "used": sum(bits.bit_count() for bits in before), "tasks": tasks}


def _rows(tensor: Stored) -> list[int]:
    """Return the rows of a packed mask, each as one number whose bits are the units."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.size)
    num_tasks, width = tensor.shape
    return [int.from_bytes(data[t * width : (t + 1) * width], "little") for t in range(num_tasks)]
