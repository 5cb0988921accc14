"""Settings of tasks and their sources; torch-free."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cl_dist.config import Section
from cl_dist.paths import ConfigPath

SplitName = Literal["train", "dev", "test"]


class Split(Section):
    """How rows are divided into train, dev and test.

    `field`: a column has the name of the split. `id_hash`: a hash of the row id, stratified by label: every label with
    three rows or more is in all splits, and its rows in dev and in test differ from their fractions by at most a third
    of the smaller one (rounded). A label within that range loses or gains no row when others are added. `files`: the
    source has one path per split.
    """

    by: Literal["field", "id_hash", "files"] = "id_hash"
    """How rows are assigned to splits: by a column, by a hash of the row id stratified by label, or by files."""
    field: str = "split"
    """Column with the name of the split (by: field)."""
    names: dict[str, SplitName | None] = {}
    """Map from names in that column to train, dev and test: {validation: dev}; null drops rows."""
    train: float = Field(0.8, gt=0, lt=1)
    """Fraction of rows for training (by: id_hash)."""
    dev: float = Field(0.1, ge=0, lt=1)
    """Fraction of rows for selection (by: id_hash); the rest is the test split. With 0 the dev split may be empty, for
    every value of `by`."""

    @model_validator(mode="after")
    def _shares_leave_a_test_split(self) -> "Split":
        if self.by == "id_hash" and self.train + self.dev >= 1:
            raise ValueError(f"train={self.train} + dev={self.dev} leaves no test rows; their sum must be below 1")
        return self


class Source(Section):
    """Location and preprocessing of the rows of a task.

    A path is a local file or `package:NAME/inner/path`, a file inside an installed package, which is located without
    importing it. With `split.by: files`, `path` is empty and `paths` has one file per split.
    """

    kind: Literal["jsonl", "csv", "tsv", "parquet", "lines", "datasets", "planted", "reader"]
    """Format of the rows."""
    path: ConfigPath = ""
    """File, also .gz; for `datasets` a folder written by `save_to_disk`, or the name of a data set on the hub; for
    `planted` the theme of synthetic texts with known rationales: food, film or place; for `reader` what it expects."""
    paths: dict[SplitName, ConfigPath] = {}
    """One file per split (split.by: files); without `dev`, set split.dev: 0."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit of a hub data set; set one so that the data cannot change during a run."""
    encoding: str = "utf-8"
    """Text encoding of the file."""
    reader: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?$")] | None = None
    """For `reader`: a function of another package, `package.module:FUNCTION` or an entry point of the group
    `cl_dist.sources`. It takes the path and yields one mapping of column names to values per row. Only the driver calls
    it, at every start of the run."""
    pattern: str | None = None
    r"""For `lines`: a regular expression with named groups, such as '(?P<label>\w+):\S+ (?P<text>.*)'."""
    where: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    """Keep only rows with this value in a column, or one of these: {domain: laptop, label: [good, bad]}."""
    columns: dict[str, str] = {}
    """Rename columns: {old: new}."""
    label_map: dict[str, str | None] = {}
    """Rename labels; a label mapped to null drops its rows."""
    label_thresholds: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    """Convert numbers to labels: {negative: [-4, -0.5], positive: [0.5, 4]}, both bounds inclusive; rows outside all
    ranges are dropped. Applied before `label_map`."""
    dedupe: bool = False
    """Keep the first row of each (text, text_pair), ignoring case and surrounding white space."""
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
            is_usable = b"\n".decode(encoding) == "\n"  # files are read line by line, which excludes UTF-16
        except (LookupError, UnicodeDecodeError):
            is_usable = False
        if not is_usable:
            raise ValueError("expected an encoding with the line ends of ASCII, such as utf-8 or cp1252")
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
                raise ValueError(f"{low} is in the ranges of {label!r} and {other!r}; bounds are inclusive")
        return ranges

    @model_validator(mode="after")
    def _is_complete(self) -> "Source":
        if (self.kind == "lines") != (self.pattern is not None):
            raise ValueError("kind: lines needs `pattern`; other kinds do not take it")
        if (self.kind == "reader") != (self.reader is not None):
            raise ValueError("kind: reader needs `reader`; other kinds do not take it")
        required = {"train", "test"} if self.split.dev == 0 else {"train", "dev", "test"}
        if self.split.by == "files" and not required <= set(self.paths):
            raise ValueError("split.by=files needs paths: {train: ..., dev: ..., test: ...}")
        if self.split.by != "files" and (not self.path or self.paths):
            raise ValueError("needs `path` (or split: {by: files} together with `paths`)")
        return self


class RowLimits(Section):
    """Maximum number of rows per split. A hash of the ids selects the rows, so the selection is the same everywhere.

    Increasing a limit adds rows and removes none.
    """

    train: int | None = Field(None, gt=0)
    """Maximum number of train rows."""
    dev: int | None = Field(None, gt=0)
    """Maximum number of dev rows."""
    test: int | None = Field(None, gt=0)
    """Maximum number of test rows."""
    balance: bool | list[SplitName] = False
    """Splits (true: all) with the same number of rows per label, as far as available; other splits keep the label
    frequencies of the full split. Scores on balanced test rows do not compare with those on the original test split."""

    def of(self, split: SplitName) -> int | None:
        """Return the limit of a split."""
        limit: int | None = getattr(self, split)
        return limit

    def balances(self, split: SplitName) -> bool:
        """Return whether a split is balanced over labels."""
        return self.balance if isinstance(self.balance, bool) else split in self.balance


class TaskConfig(Section):
    """One task of the sequence: rows of (text, text_pair) -> label, and the question for decoders."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name of the task, and of its folder: letters, digits, '_', '.' and '-'."""
    source: Source
    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with a second text, such as an aspect."""
    label: str = "label"
    """Column with the label or the answer."""
    row_id: str | None = None
    """Column with the row id; None numbers the rows of the file."""
    labels: list[str] | None = None
    """Allowed labels; None uses those of the train split, sorted."""
    question: str | None = None
    """Question to a decoder about the text, appended to text_pair if there is one."""
    output: Literal["label", "text"] = "label"
    """label: one of a set; text: free text, which needs a method with a language model."""
    rationale: str | None = None
    """Column with the spans that justify the label: a list of [start, end) offsets into the text; empty or null for a
    row without one."""
    rationale_unit: Literal["words", "chars"] = "words"
    """Unit of the offsets: words, separated by single spaces (as in ERASER), or characters."""
    environment: str | None = None
    """Column with the condition under which a row was collected, such as its source or author. InvRat selects
    rationales that are valid under all conditions."""
    metric: Literal["accuracy", "exact_match", "f1", "turn_state", "joint_state", "rouge_l", "bleu"] = "accuracy"
    """Score in the matrix R. accuracy is for labels, the others for free text (see cl_dist/data/text_metrics.py);
    joint_state needs `row_id` with ids <dialogue>-<turn number>, such as woz-7-0, and turns in order."""
    train: dict[str, Any] = {}
    """Overrides of `science.train` for this task: {epochs: 30}."""
    rows: RowLimits = RowLimits()
    """Maximum number of rows per split: {train: 320, test: 200, balance: [train]}."""

    @model_validator(mode="after")
    def _metric_fits(self) -> "TaskConfig":
        if self.output == "text" and self.labels is not None:
            raise ValueError("`labels` needs output: label")
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
    """Rules for the data of all tasks."""

    overlap: Literal["error", "drop", "warn"] = "warn"
    """Handling of test and dev rows whose text is also that of a train row of the task: fail, drop them, or count them
    and warn."""
