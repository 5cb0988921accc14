"""Splits of a task: assignment of rows, duplicates, limits, overlap, and checks of the result."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import get_args

from cl_dist.config import did_you_mean
from cl_dist.data.hash_split import hashed_splits
from cl_dist.data.rows import SPLITS, Row
from cl_dist.data.sources import Fault, Record
from cl_dist.data.tasks import DataConfig, Source, SplitName, TaskConfig
from cl_dist.data.text_metrics import turn_of
from cl_dist.data.values import word
from cl_dist.intervals import half_width, wilson

FEW_TEST_ROWS = 30
"""Fewer test rows get a warning: even at 29 rows, the 95 % interval of an accuracy of 0.5 is 0.5 -+ 0.17."""
STEPS = ("read", "where", "label", "dedupe", "split", "rows", "overlap")
"""Loading steps, in order."""


@dataclass(slots=True)
class Notes:
    """Faults, warnings and row counts of the loading steps."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEPS, 0))


@dataclass(frozen=True, slots=True)
class Item:
    """A row and its raw record."""

    row: Row
    record: Record

    @property
    def key(self) -> tuple[str, str | None]:
        """Normalized text and text_pair; rows with an equal key count as duplicates."""
        pair = self.row.text_pair
        return self.row.text.strip().casefold(), None if pair is None else pair.strip().casefold()


Splits = dict[str, list[Item]]


def remove_duplicates(items: Sequence[Item], notes: Notes) -> list[Item]:
    """Return the first item of each key."""
    first: dict[tuple[str, str | None], Item] = {}
    for item in items:
        first.setdefault(item.key, item)
    notes.counts["dedupe"] += len(items) - len(first)
    return list(first.values())


def divide(task: TaskConfig, items: Sequence[Item], notes: Notes) -> Splits:
    """Assign items to splits. Those of free text have no labels to stratify a hashed split by."""
    split = task.source.split
    splits: Splits = {name: [] for name in SPLITS}
    if split.by == "id_hash":
        rows = [(item.row.id, item.row.label if task.output == "label" else "") for item in items]
        for item, assigned in zip(items, hashed_splits(rows, split), strict=True):
            splits[assigned].append(item)
        return splits
    unknown: dict[str, list[Record]] = {}
    for item in items:
        record = item.record
        if split.by == "files":
            splits[record.split or ""].append(item)
            continue
        given = word(record.values.get(split.field))
        name = split.names.get(given, given) if given is not None else None
        if given is None:
            got = record.values.get(split.field)
            why = "is missing" if got is None else f"is not a name: {got!r:.50}"
            notes.faults.append(record.fault(split.field, f"{why}; expected the name of a split"))
        elif name is None:
            notes.counts["split"] += 1
        elif name in splits:
            splits[name].append(item)
        else:
            unknown.setdefault(given, []).append(record)
    for given, records in unknown.items():
        hint = did_you_mean(given, [*SPLITS, *split.names])
        message = f"{given!r} is not a split{and_more(records)}{hint}; map it in split.names"
        notes.faults.append(records[0].fault(split.field, message))
    return splits


def check_ids(task: TaskConfig, splits: Splits, notes: Notes) -> None:
    """Report duplicate ids in a split; across given splits they are allowed: many data sets number each from 0."""
    first: dict[str, Record] = {}
    for split in SPLITS:
        if task.source.split.by != "id_hash":
            first = {}
        for item in splits[split]:
            before = first.setdefault(item.row.id, item.record)
            if before is not item.record:
                message = f"duplicate id {item.row.id!r} in {split}, first in {before.unit} {before.line}"
                notes.faults.append(item.record.fault(task.row_id, message))


def check_turns(task: TaskConfig, splits: Splits, notes: Notes) -> None:
    """Report ids without dialogue and turn number, and turns out of order."""
    if task.row_id is None:
        message = "metric joint_state needs `row_id`: a column with <dialogue>-<turn number>, such as woz-7-0"
        notes.faults.append(Fault(task.source.path or "all files", None, None, f"{message}; turn_state does not"))
        return
    for split in SPLITS:
        latest: dict[str, tuple[int, Record]] = {}
        for item in splits[split]:
            position = turn_of(item.row.id)
            if position is None:
                message = f"id {item.row.id!r}: metric joint_state expects <dialogue>-<turn number>, such as woz-7-0"
                notes.faults.append(item.record.fault(task.row_id, message))
                continue
            dialogue, turn = position
            before, record = latest.get(dialogue, (-1, item.record))
            if turn < before:
                message = (
                    f"turn {turn} of {dialogue!r} comes after turn {before} ({record.unit} {record.line}); sort them"
                )
                notes.faults.append(item.record.fault(task.row_id, message))
            latest[dialogue] = turn, item.record


def warn_of_gaps(splits: Splits, notes: Notes) -> None:
    """Warn of dialogues with missing turns, whose accumulated state is unknown."""
    for split in ("dev", "test"):
        turns: dict[str, list[int]] = {}
        for item in splits[split]:
            if (position := turn_of(item.row.id)) is not None:
                turns.setdefault(position[0], []).append(position[1])
        incomplete = [name for name, found in turns.items() if found[0] > 1 or found[-1] - found[0] >= len(found)]
        if incomplete:
            notes.warnings.append(
                f"joint_state: {len(incomplete)} of {len(turns)} {split} dialogues have missing turns, such as "
                f"{incomplete[0]!r}; keep dialogues together in a split (split.by: field or files, no `rows` limit)"
            )


def and_more(records: Sequence[Record]) -> str:
    """Return the number of further records with the same fault, for a message."""
    return f" (here and in {len(records) - 1} more)" if len(records) > 1 else ""


def _label_set(items: Sequence[Item]) -> set[str]:
    return {item.row.label for item in items}


def _shown(labels: Collection[str]) -> str:
    return f"{len(labels)} labels" if len(labels) > 5 else ", ".join(map(repr, sorted(labels)))


def limit_rows(task: TaskConfig, splits: Splits, notes: Notes) -> None:
    """Apply the limits `rows` of a task to its splits; warn of labels that lose all their rows."""
    for split in get_args(SplitName):
        drawn = _limited(task, split, splits[split])
        notes.counts["rows"] += len(splits[split]) - len(drawn)
        if task.output == "label" and (lost := _label_set(splits[split]) - _label_set(drawn)):
            shown = _shown(lost)
            is_enough = len(drawn) >= len(_label_set(splits[split]))
            hint = f"; rows.balance=[{split}] draws every label" if is_enough else ""
            notes.warnings.append(f"rows.{split}={len(drawn)} leaves no {split} row of {shown}{hint}")
        splits[split] = drawn


def _limited(task: TaskConfig, split: SplitName, items: list[Item]) -> list[Item]:
    """Draw rows up to the limit of the task, and return them in file order.

    Rows of a label are drawn in the order of their hashes. In a balanced split, the i-th rows of all labels come before
    the (i+1)-th of any; otherwise the next row is of the label with the least (i + 1/2) / n after i of its n rows
    (Sainte-Lague), which keeps label frequencies at every limit. So a larger limit adds rows and removes none. Rows
    with free-text answers are drawn in the order of their hashes only.
    """
    limit = task.rows.of(split)
    if limit is None or len(items) <= limit:
        return items
    hashes = [hashlib.sha256(f"{task.id}\0{split}\0{item.row.id}".encode()).digest() for item in items]
    labels = [item.row.label if task.output == "label" else "" for item in items]
    rows, balances = Counter(labels), task.rows.balances(split)
    drawn: Counter[str] = Counter()
    ranked = []
    for index in sorted(range(len(items)), key=hashes.__getitem__):
        label = labels[index]
        turn = float(drawn[label]) if balances else (drawn[label] + 0.5) / rows[label]
        ranked.append((turn, hashes[index], index))
        drawn[label] += 1
    return [items[index] for index in sorted(index for _, _, index in sorted(ranked)[:limit])]


def handle_overlap(task: TaskConfig, splits: Splits, data: DataConfig, notes: Notes) -> int:
    """Apply `data.overlap` to dev and test rows whose text is that of a train row; return the number that remains."""
    trained: dict[tuple[str, str | None], Record] = {}
    for item in splits["train"]:
        trained.setdefault(item.key, item.record)
    remaining = 0
    for split in ("dev", "test"):
        shared = [item for item in splits[split] if item.key in trained]
        if data.overlap == "drop":
            splits[split] = [item for item in splits[split] if item.key not in trained]
            notes.counts["overlap"] += len(shared)
            continue
        remaining += len(shared)
        if data.overlap == "warn" and shared:
            shares = f"{len(shared)} of {len(splits[split])} {split} rows have the text of a train row"
            notes.warnings.append(f"{shares}; data.overlap=drop removes them")
        elif data.overlap == "error":
            for item in shared:
                before = trained[item.key]
                message = f"{split} row with the text of train {before.unit} {before.line}"
                notes.faults.append(item.record.fault(task.text, f"{message}; data.overlap=drop removes it"))
    return remaining


def warn_of_few_rows(task: TaskConfig, splits: Splits, whole: Splits, notes: Notes) -> None:
    """Warn of too few test rows, and of labels that a split lacks and another one has.

    Args:
        task: The task.
        splits: The rows that are used.
        whole: The rows before `task.rows` limited them; labels lost to a limit have a warning of their own.
        notes: Receives the warnings.
    """
    num = len(splits["test"])
    if 0 < num < FEW_TEST_ROWS:
        width = half_width(wilson(num // 2, num))
        notes.warnings.append(
            f"only {num} test rows: the 95 % interval of an accuracy reaches up to {width:.2f} to either side; use "
            f"{FEW_TEST_ROWS} test rows or more"
        )
    if task.output != "label":
        return
    known = {split: _label_set(items) for split, items in splits.items()}
    for split in get_args(SplitName):
        others = set().union(*known.values()) - known[split]
        limited = _label_set(whole[split]) - known[split] if task.rows.of(split) is not None else set()
        if splits[split] and (lacking := others - limited):
            notes.warnings.append(f"no {split} row has the label {_shown(lacking)}, which other splits have")


def check_not_empty(source: Source, splits: Splits, notes: Notes) -> None:
    """Report empty splits, with the number of rows that each step removed."""
    removed = [f"{step} removed {count}" for step, count in notes.counts.items() if step != "read" and count]
    history = ", ".join([f"{notes.counts['read']} rows read", *removed])
    paths = {str(split): path for split, path in source.paths.items()}
    for split in SPLITS:
        if splits[split] or (split == "dev" and source.split.dev == 0):
            continue
        hint = "; set split.dev=0 if the task has none" if split == "dev" else ""
        message = f"the {split} split is empty ({history}){hint}"
        notes.faults.append(Fault(paths.get(split, source.path), None, None, message))
