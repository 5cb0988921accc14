"""Row and TaskData: a labelled example and a loaded task as plain data; torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SPLITS = ("train", "dev", "test")
Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Where:
    """Origin of a row."""

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
    """Condition under which the row was collected, if the data has one."""
    where: Where | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TaskData:
    """The checked rows of a task."""

    id: str
    labels: tuple[str, ...]
    """labels[k] is class k of the task's head; empty for free-text answers."""
    question: str
    """Question to a decoder about each row, in addition to its text_pair."""
    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    digests: dict[str, str]
    """sha256 of ids, texts and labels, by split; inputs of fingerprints."""
    overlap: int
    """Number of dev and test rows whose text is also that of a train row (0 after dropping)."""
    warnings: tuple[str, ...] = ()

    def rows(self, split: str) -> Sequence[Row]:
        """Return the rows of one split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]
