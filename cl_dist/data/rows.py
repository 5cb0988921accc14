"""A row of a task, and a loaded task: plain data, torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SPLITS = ("train", "dev", "test")
Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Where:
    """Names the place that a row comes from."""

    file: str
    line: int | None
    unit: Unit = "line"


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled example."""

    id: str
    text: str
    text_pair: str | None
    label: str
    rationale: tuple[tuple[int, int], ...] = ()
    """Spans of `text` that justify the label, as [start, end) characters."""
    environment: str | None = None
    """Circumstance under which the row was gathered, where the data names one."""
    where: Where | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TaskData:
    """The checked rows of a task."""

    id: str
    labels: tuple[str, ...]
    """Class k of the task's head is labels[k]; none where answers are free text."""
    question: str
    """What a decoder is asked about each row, besides its text_pair."""
    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    digests: dict[str, str]
    """sha256 per split over ids, texts and labels in order: what enters fingerprints."""
    overlap: int
    """Dev and test rows whose text is also a train row (after dropping, 0)."""
    warnings: tuple[str, ...] = ()

    def rows(self, split: str) -> Sequence[Row]:
        """Return the rows of one split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]
