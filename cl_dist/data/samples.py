"""Pseudo-samples as a file: one JSON line each, token numbers beside their text.

Training reads the numbers: text that is decoded and encoded again need not give the same tokens.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cl_dist.errors import CheckpointError

SAMPLES, STATISTICS = "samples.jsonl", "replay.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that a model wrote."""

    source: int
    """The task that it was asked for."""
    number: int
    """Its place among the samples of that task, from 0."""
    attempt: int
    """How many malformed ones came before it."""
    prefix: tuple[int, ...]
    """Context and question, as tokens."""
    answer: tuple[int, ...]
    text: str
    label: str


def as_sample(plain: Mapping[str, Any]) -> Sample:
    """Return a sample from plain data.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a field is of another kind, or unknown.
    """
    return Sample(**{**plain, "prefix": tuple(plain["prefix"]), "answer": tuple(plain["answer"])})


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Write samples in the given order."""
    with (folder / SAMPLES).open("w", encoding="utf8") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


def read_samples(folder: Path) -> list[Sample]:
    """Return the samples of a folder.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    path = folder / SAMPLES
    try:
        return [as_sample(json.loads(line)) for line in path.read_text(encoding="utf8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); remove its folder and resume") from None
