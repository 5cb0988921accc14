"""Result files of voting stages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_dist.data.rationales import Span
from cl_dist.data.rows import Row, TaskData
from cl_dist.errors import CheckpointError

RATIONALES, RECORDED, CRITICAL = "rationales.jsonl", "recorded.jsonl", "critical.json"


def read_rationales(folder: Path) -> dict[str, tuple[Span, ...]]:
    """Return the rationales of a Rationalise stage, by row id, as [start, end) characters.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    lines = [json.loads(line) for line in _read(folder / RATIONALES).split("\n") if line]
    return {row_id: tuple((start, end) for start, end in spans) for row_id, spans in lines}


def read_recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a Record stage, one per row.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    return [json.loads(line) for line in _read(folder / RECORDED).split("\n") if line]


def read_critical(folder: Path) -> dict[str, Any]:
    """Return the result of a Vote stage: the chosen units, as (layer, unit) pairs, and the vote counts.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    found: dict[str, Any] = json.loads(_read(folder / CRITICAL))
    return found


def voting_rows(data: TaskData, samples: int) -> Sequence[Row]:
    """Return the voting rows of a task: its first dev rows, or train rows if it has no dev rows."""
    return (data.dev or data.train)[:samples]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf8")
        json.loads(text if path.suffix == ".json" else f"[{','.join(line for line in text.split(chr(10)) if line)}]")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); remove its folder and resume") from None
    return text
