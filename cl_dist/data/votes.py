"""What voting stages leave behind, as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_dist.data.rationales import Span
from cl_dist.data.rows import Row, TaskData
from cl_dist.errors import CheckpointError

RATIONALES, RECORDED, CRITICAL = "rationales.jsonl", "recorded.jsonl", "critical.json"


def read_rationales(folder: Path) -> dict[str, tuple[Span, ...]]:
    """Return what a Rationalise stage wrote: of each row, by its id, the [start, end) characters of its rationale.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    lines = [json.loads(line) for line in _read(folder / RATIONALES).split("\n") if line]
    return {row_id: tuple((start, end) for start, end in spans) for row_id, spans in lines}


def read_recorded(folder: Path) -> list[dict[str, Any]]:
    """Return what a Record stage wrote, a line per row.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    return [json.loads(line) for line in _read(folder / RECORDED).split("\n") if line]


def read_critical(folder: Path) -> dict[str, Any]:
    """Return what a Vote stage wrote: the units chosen, as (layer, unit) pairs, and the count behind the choice.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    found: dict[str, Any] = json.loads(_read(folder / CRITICAL))
    return found


def voting_rows(data: TaskData, samples: int) -> Sequence[Row]:
    """Return the rows of a task that may vote: its first dev rows, or train rows where it has no dev rows."""
    return (data.dev or data.train)[:samples]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf8")
        json.loads(text if path.suffix == ".json" else f"[{','.join(line for line in text.split(chr(10)) if line)}]")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); remove its folder and resume") from None
    return text
