"""Loading of a task: its settings to checked rows, in fixed steps, with a report of all faults.

read -> where -> columns -> label_thresholds, label_map -> required fields -> dedupe -> split -> rows -> overlap
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.data.labels import escaped, label_warnings, likeness
from cl_dist.data.rationales import read_spans
from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.sources import SHOWN, Fault, Record, listing, read
from cl_dist.data.splits import (
    Item,
    Notes,
    Splits,
    and_more,
    check_ids,
    check_not_empty,
    check_turns,
    divide,
    handle_overlap,
    limit_rows,
    remove_duplicates,
    warn_of_few_rows,
    warn_of_gaps,
)
from cl_dist.data.tasks import DataConfig, Source, TaskConfig
from cl_dist.data.values import id_fault, label_fault, text_fault, word, word_fault
from cl_dist.errors import DataError, printable
from cl_dist.stage import digest_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of loading a task: valid rows, faults and warnings."""

    data: TaskData
    """All rows if there are no faults; otherwise the rows without a fault."""
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    counts: dict[str, int]
    """Rows `read`, then rows removed by `where`, `label` (map or thresholds), `dedupe`, `split` (a name mapped to
    null), `rows` and `overlap`."""

    def label_counts(self, split: str) -> dict[str, int]:
        """Return the number of rows of each label in a split, in the order of the task's labels."""
        counted = Counter(row.label for row in self.data.rows(split))
        return {label: counted[label] for label in self.data.labels}

    def label_shares(self, split: str) -> dict[str, float]:
        """Return the fraction of a split's rows that each label has; empty for a split without rows."""
        total = len(self.data.rows(split))
        return {label: count / total for label, count in self.label_counts(split).items()} if total else {}


def load_task(task: TaskConfig, data: DataConfig) -> TaskData:
    """Return the rows of a task.

    Raises:
        DataError: If any row is invalid; the message has file, line and field of the first twenty faults.
    """
    checked = check_task(task, data)
    if checked.faults:
        head = f"task {task.id}: {len(checked.faults)} fault(s) in its data (cl-dist data check lists them all)"
        raise DataError(f"{head}\n{listing(checked.faults)}")
    for warning in checked.warnings:
        log.warning("data task=%s %s", task.id, warning)
    return checked.data


def check_task(task: TaskConfig, data: DataConfig) -> Checked:
    """Load a task and collect all faults of its data."""
    notes = Notes()
    items = _items(task, _read(task, notes), notes)
    if task.source.dedupe:
        items = remove_duplicates(items, notes)
    splits = divide(task, items, notes)
    is_complete = not notes.faults  # otherwise a split may be empty only because of faulty rows
    check_ids(task, splits, notes)
    if task.metric == "joint_state":
        check_turns(task, splits, notes)
    labels = _labels(task, splits, notes) if task.output == "label" else ()
    whole = dict(splits)
    limit_rows(task, splits, notes)
    overlap = handle_overlap(task, splits, data, notes)
    if task.metric == "joint_state" and task.row_id is not None:
        warn_of_gaps(splits, notes)
    if is_complete:
        check_not_empty(task.source, splits, notes)
        warn_of_few_rows(task, splits, whole, notes)

    train, dev, test = (tuple(item.row for item in splits[split]) for split in SPLITS)
    digests = {
        str(split): digest_of([[row.id, row.text, row.text_pair, row.label] for row in rows])
        for split, rows in zip(SPLITS, (train, dev, test), strict=True)
    }
    if task.rationale is not None:
        digests["rationales"] = digest_of([[row.id, row.rationale] for row in (*train, *dev)])
    if task.environment is not None:
        digests["environments"] = digest_of([[row.id, row.environment] for row in (*train, *dev)])
    warnings = tuple(map(printable, notes.warnings))
    loaded = TaskData(task.id, labels, task.question or "", train, dev, test, digests, overlap, warnings)
    return Checked(loaded, tuple(notes.faults), warnings, notes.counts)


def _read(task: TaskConfig, notes: Notes) -> list[Record]:
    """Read the source, filter by `where` and rename columns; report settings whose column does not exist."""
    source = task.source
    records = []
    columns: dict[str, set[str]] = {}  # by file, the columns of any of its rows
    allowed = {column: [words] if isinstance(words, str) else words for column, words in source.where.items()}
    seen: dict[str, set[str]] = {column: set() for column in allowed}
    wanted = {"text": task.text, "text_pair": task.text_pair, "label": task.label, "row_id": task.row_id}
    wanted |= {"rationale": task.rationale, "environment": task.environment}
    wanted["split.field"] = source.split.field if source.split.by == "field" else None
    read_columns = {column for column in (*wanted.values(), *source.columns, *allowed) if column is not None}
    for record in read(source, notes.faults, read_columns):
        notes.counts["read"] += 1
        columns.setdefault(record.file, set()).update(record.values)
        words = {column: word(record.values.get(column)) for column in allowed}
        for column, found in words.items():
            if found is not None:
                seen[column].add(found)
        if all(words[column] in values for column, values in allowed.items()):
            records.append(_renamed(record, source.columns))
        else:
            notes.counts["where"] += 1

    absent = []
    for file, known in columns.items():
        renamed = {source.columns.get(column, column) for column in known}
        needs = [("where", column, known) for column in allowed]
        needs += [("columns", column, known) for column in source.columns]
        needs += [(setting, column, renamed) for setting, column in wanted.items() if column is not None]
        for setting, column, have in needs:
            if column not in have:
                hint = did_you_mean(column, sorted(have))
                absent.append(Fault(file, None, column, f"no row has this column, which `{setting}` refers to{hint}"))
    for column, value in ((column, value) for column, values in allowed.items() for value in values):
        if seen[column] and value not in seen[column]:
            hint = did_you_mean(value, sorted(seen[column])[:50])
            file = source.path or "all files"
            notes.faults.append(Fault(file, None, column, f"no row has the value {value!r} of `where`{hint}"))
    notes.faults += absent
    return [] if absent else records  # every row would repeat that its column is absent


def _renamed(record: Record, columns: dict[str, str]) -> Record:
    """Rename columns simultaneously, so that two can be swapped; a renamed column replaces one of the new name."""
    values = {column: value for column, value in record.values.items() if column not in columns}
    values |= {new: record.values[old] for old, new in columns.items() if old in record.values}
    return Record(record.file, record.line, record.id, record.split, values, record.unit)


def _items(task: TaskConfig, records: Sequence[Record], notes: Notes) -> list[Item]:
    """Convert records to rows; a dropped label drops its row, even if that has faults."""
    source = task.source
    items = []
    seen = set()
    for record in records:
        values = record.values
        label, fault = _label(values.get(task.label), source)
        if label is not None:
            seen.add(label)
            label = source.label_map.get(label, label)
        if label is None and fault is None:
            notes.counts["label"] += 1
            continue
        row_id = record.id if task.row_id is None else values.get(task.row_id)
        found = [(task.text, text_fault(values.get(task.text)))]
        if task.text_pair is not None:
            found.append((task.text_pair, text_fault(values.get(task.text_pair), may_be_empty=True)))
        if task.row_id is not None:
            found.append((task.row_id, id_fault(row_id)))
        if task.environment is not None:
            found.append((task.environment, word_fault(values.get(task.environment))))
        found.append((task.label, fault))
        spans: tuple[tuple[int, int], ...] = ()
        if task.rationale is not None and isinstance(values.get(task.text), str):
            spans, wrong = read_spans(values.get(task.rationale), values[task.text], task.rationale_unit)
            found.append((task.rationale, wrong))
        faults = [record.fault(column, message) for column, message in found if message is not None]
        notes.faults += faults
        if not faults and label is not None:
            pair = None if task.text_pair is None else values[task.text_pair]
            environment = None if task.environment is None else word(values.get(task.environment))
            where = Where(record.file, record.line, record.unit)
            items.append(Item(Row(str(row_id), values[task.text], pair, label, spans, environment, where), record))
    if seen:
        notes.warnings += [
            f"label_map: no row has the label {label!r}{did_you_mean(label, sorted(seen))}"
            for label in source.label_map
            if label not in seen
        ]
    return items


def _label(given: Any, source: Source) -> tuple[str | None, str | None]:
    """Return (label before label_map, None) or (None, fault); (None, None) if it is in no threshold range."""
    if (fault := label_fault(given)) is not None:
        return None, fault
    label = word(given)
    assert label is not None
    if not source.label_thresholds:
        return label, None
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        return None, f"label_thresholds needs a number, got {label!r}"
    for name, (low, high) in source.label_thresholds.items():
        if low <= number <= high:
            return name, None
    return None, None


def _labels(task: TaskConfig, splits: Splits, notes: Notes) -> tuple[str, ...]:
    """Return the declared labels, or those of all train rows (before the `rows` limit), sorted; report unknown ones."""
    trained = {item.row.label for item in splits["train"]}
    rows = Counter(dict.fromkeys(task.labels or (), 0))
    rows.update(item.row.label for split in SPLITS for item in splits[split])
    notes.warnings += label_warnings(rows)
    labels = tuple(sorted(trained)) if task.labels is None else tuple(task.labels)
    if not trained:
        return labels  # an empty split is reported elsewhere
    unused = [label for label in labels if label not in trained]
    notes.warnings += [f"label {label!r} is declared, but no train row has it" for label in unused]
    if len(labels) == 1:
        message = f"all train rows have the label {labels[0]!r}; a task needs two labels or more"
        notes.faults.append(splits["train"][0].record.fault(task.label, message))
    why = "never occurs in train" if task.labels is None else "is not declared in `labels`"
    for split in SPLITS:
        unknown: dict[str, list[Record]] = {}
        for item in splits[split]:
            if item.row.label not in labels:
                unknown.setdefault(item.row.label, []).append(item.record)
        for label, records in unknown.items():
            hint = did_you_mean(label, labels) if len(notes.faults) < SHOWN else ""  # slow for free text
            shown = repr(label)
            if alike := [known for known in labels if likeness(known) == likeness(label)]:
                shown = escaped(label, alike[:1])
                hint = f"; {escaped(alike[0], [label])} looks the same"
            message = f"label {shown} of {split}{and_more(records)} {why}{hint}"
            notes.faults.append(records[0].fault(task.label, message))
    return labels
