"""From the settings of a task to its checked rows: each step once, in a fixed order, every fault named.

read -> where -> columns -> label_thresholds, label_map -> required fields -> dedupe -> split -> rows -> overlap
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from cl_dist.config import did_you_mean
from cl_dist.data.labels import label_warnings, likeness, told_apart
from cl_dist.data.rationales import read_spans
from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.sources import SHOWN, Fault, Record, listing, read
from cl_dist.data.tasks import DataConfig, Source, Split, SplitName, TaskConfig
from cl_dist.data.text_metrics import turn_of
from cl_dist.data.values import id_fault, label_fault, text_fault, word, word_fault
from cl_dist.errors import DataError, printable
from cl_dist.stage import digest_of

log = logging.getLogger(__name__)

STEPS = ("read", "where", "label", "dedupe", "split", "rows", "overlap")


@dataclass(frozen=True, slots=True)
class Checked:
    """A task as far as it can be used, and all that was noticed on the way."""

    data: TaskData
    """Complete where there are no faults; otherwise the rows without one."""
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    counts: dict[str, int]
    """Rows `read`, then rows taken away by `where`, `label` (map or thresholds), `dedupe`, `split` (a name that
    stands for null), `rows` and `overlap`."""

    def label_counts(self, split: str) -> dict[str, int]:
        """Return the rows of each label in a split, in the order of the task's labels."""
        counted = Counter(row.label for row in self.data.rows(split))
        return {label: counted[label] for label in self.data.labels}


@dataclass(slots=True)
class _Notes:
    """What the steps notice as they go."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEPS, 0))


@dataclass(frozen=True, slots=True)
class _Item:
    """A row, and the record it comes from."""

    row: Row
    record: Record

    @property
    def key(self) -> tuple[str, str | None]:
        """What two rows share that count as the same text."""
        pair = self.row.text_pair
        return self.row.text.strip().casefold(), None if pair is None else pair.strip().casefold()


Splits = dict[str, list[_Item]]


def load_task(task: TaskConfig, data: DataConfig) -> TaskData:
    """Return the rows of a task.

    Raises:
        DataError: If any row cannot be used, naming file, line and field of the first twenty faults.
    """
    checked = check_task(task, data)
    if checked.faults:
        head = f"task {task.id}: {len(checked.faults)} fault(s) in its data (cl-dist data check lists them all)"
        raise DataError(f"{head}\n{listing(checked.faults)}")
    for warning in checked.warnings:
        log.warning("data task=%s %s", task.id, warning)
    return checked.data


def check_task(task: TaskConfig, data: DataConfig) -> Checked:
    """Load a task and collect every fault of its data instead of stopping at the first."""
    notes = _Notes()
    items = _items(task, _read(task, notes), notes)
    if task.source.dedupe:
        items = _without_repeats(items, notes)
    splits = _divide(task.source.split, items, notes)
    is_whole = not notes.faults  # otherwise a split may be empty only because its rows have faults
    _check_ids(task, splits, notes)
    if task.metric == "joint_state":
        _check_turns(task, splits, notes)
    labels = _labels(task, splits, notes) if task.output == "label" else ()
    for split in get_args(SplitName):
        kept = _limited(task, split, splits[split])
        notes.counts["rows"] += len(splits[split]) - len(kept)
        if task.output == "label" and (lost := _label_set(splits[split]) - _label_set(kept)):
            shown = f"{len(lost)} labels" if len(lost) > 5 else ", ".join(map(repr, sorted(lost)))
            hint = f"; rows.balance=[{split}] draws every label" if len(kept) >= len(_label_set(splits[split])) else ""
            notes.warnings.append(f"rows.{split}={len(kept)} leaves no {split} row of {shown}{hint}")
        splits[split] = kept
    overlap = _overlap(task, splits, data, notes)
    if task.metric == "joint_state" and task.row_id is not None:
        _warn_of_gaps(splits, notes)
    if is_whole:
        _check_none_is_empty(task.source, splits, notes)

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


def _read(task: TaskConfig, notes: _Notes) -> list[Record]:
    """Read the source, keep what `where` names and rename columns; name settings whose column is in no row."""
    source = task.source
    kept = []
    columns: dict[str, set[str]] = {}  # of each file, the columns that any of its rows has
    allowed = {column: [words] if isinstance(words, str) else words for column, words in source.where.items()}
    seen: dict[str, set[str]] = {column: set() for column in allowed}
    wanted = {"text": task.text, "text_pair": task.text_pair, "label": task.label, "row_id": task.row_id}
    wanted |= {"rationale": task.rationale, "environment": task.environment}
    wanted["split.field"] = source.split.field if source.split.by == "field" else None
    looked_at = {column for column in (*wanted.values(), *source.columns, *allowed) if column is not None}
    for record in read(source, notes.faults, looked_at):
        notes.counts["read"] += 1
        columns.setdefault(record.file, set()).update(record.values)
        words = {column: word(record.values.get(column)) for column in allowed}
        for column, found in words.items():
            if found is not None:
                seen[column].add(found)
        if all(words[column] in values for column, values in allowed.items()):
            kept.append(_renamed(record, source.columns))
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
                absent.append(Fault(file, None, column, f"`{setting}` names it, but no row has this column{hint}"))
    for column, value in ((column, value) for column, values in allowed.items() for value in values):
        if seen[column] and value not in seen[column]:
            hint = did_you_mean(value, sorted(seen[column])[:50])
            file = source.path or "all files"
            notes.faults.append(Fault(file, None, column, f"`where` asks for {value!r}, which no row has{hint}"))
    notes.faults += absent
    return [] if absent else kept  # every row would only repeat that its column is absent


def _renamed(record: Record, columns: dict[str, str]) -> Record:
    """Rename columns at one go, so that two can change places; a renamed column replaces one of that name."""
    values = {column: value for column, value in record.values.items() if column not in columns}
    values |= {new: record.values[old] for old, new in columns.items() if old in record.values}
    return Record(record.file, record.line, record.id, record.split, values, record.unit)


def _items(task: TaskConfig, records: Sequence[Record], notes: _Notes) -> list[_Item]:
    """Make rows of records: the label first, since a dropped label takes its row along, faults and all."""
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
            items.append(_Item(Row(str(row_id), values[task.text], pair, label, spans, environment, where), record))
    if seen:
        notes.warnings += [
            f"label_map: no row has the label {label!r}{did_you_mean(label, sorted(seen))}"
            for label in source.label_map
            if label not in seen
        ]
    return items


def _label(given: Any, source: Source) -> tuple[str | None, str | None]:
    """Return (label before label_map, None) or (None, fault); twice None where no threshold takes it."""
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
        return None, f"label_thresholds expect a number, got {label!r}"
    for name, (low, high) in source.label_thresholds.items():
        if low <= number <= high:
            return name, None
    return None, None


def _without_repeats(items: Sequence[_Item], notes: _Notes) -> list[_Item]:
    first: dict[tuple[str, str | None], _Item] = {}
    for item in items:
        first.setdefault(item.key, item)
    notes.counts["dedupe"] += len(items) - len(first)
    return list(first.values())


def _divide(split: Split, items: Sequence[_Item], notes: _Notes) -> Splits:
    splits: Splits = {name: [] for name in SPLITS}
    unknown: dict[str, list[Record]] = {}
    for item in items:
        record = item.record
        if split.by == "id_hash":
            splits[_hashed_split(item.row.id, split)].append(item)
            continue
        if split.by == "files":
            splits[record.split or ""].append(item)
            continue
        given = word(record.values.get(split.field))
        name = split.names.get(given, given) if given is not None else None
        if given is None:
            got = record.values.get(split.field)
            why = "is missing" if got is None else f"is no name: {got!r:.50}"
            notes.faults.append(record.fault(split.field, f"{why}; expected the name of a split"))
        elif name is None:
            notes.counts["split"] += 1
        elif name in splits:
            splits[name].append(item)
        else:
            unknown.setdefault(given, []).append(record)
    for given, records in unknown.items():
        hint = did_you_mean(given, [*SPLITS, *split.names])
        message = f"{given!r} is no split{_and_more(records)}{hint}; give it a meaning in split.names"
        notes.faults.append(records[0].fault(split.field, message))
    return splits


def _hashed_split(row_id: str, split: Split) -> str:
    """Return the split of an id: its hash, as a number in [0, 1), against the shares, and nothing else."""
    number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:6], "big") / 2**48
    if number < split.train:
        return "train"
    return "dev" if number < split.train + split.dev else "test"


def _check_ids(task: TaskConfig, splits: Splits, notes: _Notes) -> None:
    """Name ids that come twice in a split; not across splits, since releases often number each split from 0."""
    for split in SPLITS:
        first: dict[str, Record] = {}
        for item in splits[split]:
            before = first.setdefault(item.row.id, item.record)
            if before is not item.record:
                message = f"id {item.row.id!r} of {split} is already that of {before.unit} {before.line}"
                notes.faults.append(item.record.fault(task.row_id, message))


def _check_turns(task: TaskConfig, splits: Splits, notes: _Notes) -> None:
    """Name ids that do not say which turn of which dialogue a row is, and turns out of order."""
    if task.row_id is None:
        message = "metric joint_state needs `row_id`: a column with <dialogue>-<number of the turn>, such as woz-7-0"
        notes.faults.append(Fault(task.source.path or "all files", None, None, f"{message}; turn_state needs none"))
        return
    for split in SPLITS:
        latest: dict[str, tuple[int, Record]] = {}
        for item in splits[split]:
            place = turn_of(item.row.id)
            if place is None:
                message = (
                    f"id {item.row.id!r}: metric joint_state expects <dialogue>-<number of the turn>, such as woz-7-0"
                )
                notes.faults.append(item.record.fault(task.row_id, message))
                continue
            dialogue, turn = place
            before, record = latest.get(dialogue, (-1, item.record))
            if turn < before:
                message = (
                    f"turn {turn} of {dialogue!r} comes after turn {before} ({record.unit} {record.line}); sort them"
                )
                notes.faults.append(item.record.fault(task.row_id, message))
            latest[dialogue] = turn, item.record


def _warn_of_gaps(splits: Splits, notes: _Notes) -> None:
    """Warn of dialogues that lack turns: what a dialogue has come to is then not known."""
    for split in ("dev", "test"):
        turns: dict[str, list[int]] = {}
        for item in splits[split]:
            if (place := turn_of(item.row.id)) is not None:
                turns.setdefault(place[0], []).append(place[1])
        torn = [name for name, found in turns.items() if found[0] > 1 or found[-1] - found[0] >= len(found)]
        if torn:
            notes.warnings.append(
                f"joint_state: {len(torn)} of {len(turns)} {split} dialogues lack turns, such as {torn[0]!r}; keep "
                "whole dialogues in a split (split.by: field or files, no `rows` limit)"
            )


def _labels(task: TaskConfig, splits: Splits, notes: _Notes) -> tuple[str, ...]:
    """Return the labels declared, or those of all train rows (before the `rows` limit), sorted; name others."""
    trained = {item.row.label for item in splits["train"]}
    rows = Counter(dict.fromkeys(task.labels or (), 0))
    rows.update(item.row.label for split in SPLITS for item in splits[split])
    notes.warnings += label_warnings(rows)
    labels = tuple(sorted(trained)) if task.labels is None else tuple(task.labels)
    if not trained:
        return labels  # an empty split is a fault of its own
    never = [label for label in labels if label not in trained]
    notes.warnings += [f"label {label!r} is declared, but no train row has it" for label in never]
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
            hint = did_you_mean(label, labels) if len(notes.faults) < SHOWN else ""  # slow on free text
            shown = repr(label)
            if alike := [known for known in labels if likeness(known) == likeness(label)]:
                shown = told_apart(label, alike[:1])
                hint = f"; {told_apart(alike[0], [label])} reads alike"
            message = f"label {shown} of {split}{_and_more(records)} {why}{hint}"
            notes.faults.append(records[0].fault(task.label, message))
    return labels


def _and_more(records: Sequence[Record]) -> str:
    return f" (here and in {len(records) - 1} more)" if len(records) > 1 else ""


def _label_set(items: Sequence[_Item]) -> set[str]:
    return {item.row.label for item in items}


def _limited(task: TaskConfig, split: SplitName, items: list[_Item]) -> list[_Item]:
    """Draw as many rows as the task says, and return them in file order.

    Within a label, rows are drawn in the order of their hashes. Labels take turns: where the split is balanced, the
    i-th row of every label comes before the (i+1)-th of any; otherwise, after i of its n rows, the label with the
    least (i + 1/2) / n comes next (Sainte-Lague), so that every label has its share of the split, whatever the bound.
    So a larger bound adds rows and takes none away. Answers that are free text are drawn as they come.
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


def _overlap(task: TaskConfig, splits: Splits, data: DataConfig, notes: _Notes) -> int:
    """Treat dev and test rows whose text is also a train row as the policy says; return how many remain."""
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
            notes.warnings.append(f"{shares}; data.overlap=drop leaves them out")
        elif data.overlap == "error":
            for item in shared:
                before = trained[item.key]
                message = f"{split} row with the text of train {before.unit} {before.line}"
                notes.faults.append(item.record.fault(task.text, f"{message}; data.overlap=drop leaves it out"))
    return remaining


def _check_none_is_empty(source: Source, splits: Splits, notes: _Notes) -> None:
    """Name splits without rows, and the steps that took rows away: one of them is usually why."""
    taken = [f"{step} took {count}" for step, count in notes.counts.items() if step != "read" and count]
    story = ", ".join([f"{notes.counts['read']} rows read", *taken])
    paths = {str(split): path for split, path in source.paths.items()}
    for split in SPLITS:
        if splits[split] or (split == "dev" and source.split.dev == 0):
            continue
        hint = "; split.dev=0 says that the task has none" if split == "dev" else ""
        message = f"the {split} split is empty ({story}){hint}"
        notes.faults.append(Fault(paths.get(split, source.path), None, None, message))
