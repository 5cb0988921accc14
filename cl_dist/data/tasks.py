"""Tasks and their sources as settings; torch-free, so that a driver can plan without it."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cl_dist.config import Section
from cl_dist.paths import Place

SplitName = Literal["train", "dev", "test"]


class Split(Section):
    """How rows are divided into train, dev and test.

    `field`: a column of the row holds the split's name. `id_hash`: a hash of the row id decides, so a row keeps
    its split whatever other rows come or go. `files`: the source names one path per split.
    """

    by: Literal["field", "id_hash", "files"] = "id_hash"
    """How rows are assigned to splits: by a column, by a hash of the row id, or by files."""
    field: str = "split"
    """Column that names the split (by: field)."""
    names: dict[str, SplitName | None] = {}
    """Names used in that column, when they are not train, dev and test: {validation: dev}; null drops rows."""
    train: float = Field(0.8, gt=0, lt=1)
    """Share of rows for training (by: id_hash)."""
    dev: float = Field(0.1, ge=0, lt=1)
    """Share of rows for selection (by: id_hash); the rest is the test split. 0 says, also of splits that are
    given, that there need not be any."""

    @model_validator(mode="after")
    def _shares_leave_a_test_split(self) -> "Split":
        if self.by == "id_hash" and self.train + self.dev >= 1:
            raise ValueError(f"train={self.train} + dev={self.dev} leaves no test rows; their sum must stay below 1")
        return self


class Source(Section):
    """Where the rows of a task are.

    A path may be a local file or `package:NAME/inner/path`, a file inside an installed package, which is found
    without importing it. With `split.by: files`, `path` is empty and `paths` names one file per split.
    """

    kind: Literal["jsonl", "csv", "tsv", "parquet", "lines", "datasets", "planted"]
    """Format of the rows."""
    path: Place = ""
    """File (.gz is read too); for `datasets` a folder written by `save_to_disk`, or the name of a hub set; for
    `planted` the theme of made-up texts with known rationales: food, film or place."""
    paths: dict[SplitName, Place] = {}
    """One file per split (split.by: files)."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit of a hub data set: name one, so that the data cannot change under a run."""
    encoding: str = "utf-8"
    """Text encoding of the file."""
    pattern: str | None = None
    r"""For `lines`: a regular expression with named groups, such as '(?P<label>\w+):\S+ (?P<text>.*)'."""
    where: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    """Keep only rows whose columns have these values, or one of several: {domain: laptop, label: [good, bad]}."""
    columns: dict[str, str] = {}
    """Rename columns on reading: {old: new}."""
    label_map: dict[str, str | None] = {}
    """Rename labels; a label mapped to null drops its rows."""
    label_thresholds: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    """Turn a number into a label: {negative: [-4, -0.5], positive: [0.5, 4]}, both bounds inclusive; rows in no
    range are dropped. `label_map` sees the labels made here."""
    dedupe: bool = False
    """Keep the first row of each (text, text_pair), compared without case and outer white space."""
    split: Split = Split()

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("encoding")
    @classmethod
    def _encoding_keeps_line_ends(cls, encoding: str) -> str:
        try:
            is_usable = b"\n".decode(encoding) == "\n"  # files are read line by line; not so of UTF-16, for one
        except (LookupError, UnicodeDecodeError):
            is_usable = False
        if not is_usable:
            raise ValueError("expected an encoding whose line ends are those of ASCII, such as utf-8 or cp1252")
        return encoding

    @field_validator("label_thresholds")
    @classmethod
    def _ranges_are_apart(cls, ranges: dict[str, list[float]]) -> dict[str, list[float]]:
        spans = sorted((low, high, label) for label, (low, high) in ranges.items())
        for low, high, label in spans:
            if low > high:
                raise ValueError(f"{label}=[{low}, {high}]: expected the lower bound first")
        for (_, high, label), (low, _, other) in pairwise(spans):
            if low <= high:
                raise ValueError(f"{low} would be both {label!r} and {other!r}; both bounds belong to a range")
        return ranges

    @model_validator(mode="after")
    def _is_complete(self) -> "Source":
        if (self.kind == "lines") != (self.pattern is not None):
            raise ValueError("`pattern` belongs to kind: lines, and to no other kind")
        if self.split.by == "files" and set(self.paths) != {"train", "dev", "test"}:
            raise ValueError("split.by=files needs paths: {train: ..., dev: ..., test: ...}")
        if self.split.by != "files" and (not self.path or self.paths):
            raise ValueError("needs `path` (or split: {by: files} together with `paths`)")
        return self


class RowLimits(Section):
    """Upper bounds of rows per split. Which rows are drawn follows from a hash of their ids, on every machine alike.

    A larger bound adds rows and takes none away.
    """

    train: int | None = Field(None, gt=0)
    """Maximum number of train rows."""
    dev: int | None = Field(None, gt=0)
    """Maximum number of dev rows."""
    test: int | None = Field(None, gt=0)
    """Maximum number of test rows."""
    balance: bool | list[SplitName] = False
    """Splits, or true for all, that get as many rows of every label as they have; the others keep the shares that
    labels have in the whole split. Balanced test rows score another test than the data's."""

    def of(self, split: SplitName) -> int | None:
        """Return the bound of a split."""
        bound: int | None = getattr(self, split)
        return bound

    def balances(self, split: SplitName) -> bool:
        """Return whether a split gets as many rows of every label."""
        return self.balance if isinstance(self.balance, bool) else split in self.balance


class TaskConfig(Section):
    """One task of the sequence: rows of (text, text_pair) -> label, with the words a decoder is asked in."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name of the task; it becomes a folder name, so letters, digits, '_', '.' and '-' only."""
    source: Source
    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with a second text, such as an aspect."""
    label: str = "label"
    """Column with the label or the answer."""
    row_id: str | None = None
    """Column with the row's id; None numbers the rows of the file."""
    labels: list[str] | None = None
    """The allowed labels; None takes those of the train split, sorted."""
    question: str | None = None
    """What a decoder is asked about the text, behind text_pair where there is one."""
    output: Literal["label", "text"] = "label"
    """label: one of a set; text: anything, which only a method that writes answers can learn."""
    rationale: str | None = None
    """Column with the spans that justify the label: a list of [start, end) offsets into the text; empty or null where a
    row has none."""
    rationale_unit: Literal["words", "chars"] = "words"
    """What the offsets count: words of the text cut at single spaces (as in ERASER), or characters."""
    environment: str | None = None
    """Column with the circumstance under which a row was gathered: its source or its author, say. InvRat looks for
    rationales that hold in all of them."""
    metric: Literal["accuracy", "exact_match", "f1", "turn_state", "joint_state", "rouge_l", "bleu"] = "accuracy"
    """What the cells of R hold. accuracy: of labels; the others compare free text (see cl_dist/data/text_metrics.py);
    joint_state needs `row_id`, with ids <dialogue>-<number of the turn>, such as woz-7-0, and turns in order."""
    train: dict[str, Any] = {}
    """Settings of `science.train` that differ for this task: {epochs: 30}."""
    rows: RowLimits = RowLimits()
    """Take so many rows of a split at most: {train: 320, test: 200, balance: [train]}."""

    @model_validator(mode="after")
    def _metric_fits(self) -> "TaskConfig":
        if self.output == "text" and self.labels is not None:
            raise ValueError("`labels` need output: label")
        if (self.metric == "accuracy") != (self.output == "label"):
            free = "exact_match, f1, turn_state, joint_state, rouge_l or bleu"
            kinds = "accuracy" if self.output == "label" else free
            raise ValueError(f"metric={self.metric!r} does not fit output={self.output!r}: expected {kinds}")
        return self

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None and (len(set(labels)) != len(labels) or len(labels) < 2):
            raise ValueError("expected two or more distinct labels")
        return labels


class DataConfig(Section):
    """Rules that hold for the data of every task."""

    overlap: Literal["error", "drop", "warn"] = "warn"
    """What to do with a test or dev row whose text is also a train row of its task: refuse it, drop it, or
    count it and warn."""
