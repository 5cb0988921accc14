"""Faults of the rows of a model that writes: labels that its tokenizer cannot tell apart, and rows that do not fit.

Found before anything is computed, instead of in the stage that first meets such a row, or never.
"""

from collections.abc import Iterable, Iterator, Sequence

from cl_dist.data.language import BETWEEN, TextCodec, asked_of
from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.sources import Fault
from cl_dist.data.tasks import TaskConfig

_CHUNK = 4096


def label_faults(labels: Sequence[str], codec: TextCodec) -> list[str]:
    """Return what is wrong with labels that are to be written: spelled alike, or as nothing.

    An answer ends at the first end-of-text token, so labels are compared up to there.
    """
    faults = []
    first: dict[tuple[int, ...], str] = {}
    for label in labels:
        tokens = codec.encode(label)
        eos = codec.special.eos
        spelled = tuple(tokens[: tokens.index(eos)] if eos in tokens else tokens)
        if not spelled:
            why = "the end of text" if tokens else "no token"
            faults.append(f"label {label!a} is {why} to the tokenizer, so no answer can be this label")
            continue
        other = first.setdefault(spelled, label)
        if other != label:
            shown = codec.show(spelled)
            faults.append(
                f"labels {other!a} and {label!a} are the same to the tokenizer ({shown}), so one is never given"
            )
    return faults


def length_faults(
    task: TaskConfig, data: TaskData, codec: TextCodec, max_length: int, blind: Iterable[str] = ("test",)
) -> Iterator[Fault]:
    """Yield a fault for each row whose question and answer exceed max_length.

    Rows are laid out as questions with answers (see data.language): those of `blind` splits are answered, so they leave
    room for the longest answer of the train rows, others for their own.
    """
    answers = _lengths(codec, (row.label for row in data.train))
    longest = max(answers.values(), default=0)
    for split in SPLITS:
        rows = data.rows(split)
        is_blind = split in blind
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            questions = _lengths(codec, (asked_of(row, data.question) for row in part))
            own = {} if is_blind and split != "dev" else _lengths(codec, (row.label for row in part))
            for row in part:
                asked, answer = questions[asked_of(row, data.question)], own.get(row.label, 0)
                needed = asked + max(answer, longest if is_blind else 0) + BETWEEN
                if needed > max_length:
                    where = row.where or Where(f"row {row.id}", None)
                    message, column = _message(asked, needed, max_length), _column(task, row, asked, answer)
                    yield Fault(where.file, where.line, column, message, where.unit)


def _lengths(codec: TextCodec, texts: Iterable[str]) -> dict[str, int]:
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, codec.lengths(distinct), strict=True))


def _column(task: TaskConfig, row: Row, asked: int, answer: int) -> str | None:
    """Return the column that is to blame: that of the answer or of text_pair; none where it is the task's question."""
    return task.label if answer > asked else task.text_pair if row.text_pair else None


def _message(asked: int, needed: int, max_length: int) -> str:
    return (
        f"question and answer have {asked} + {needed - asked - BETWEEN} tokens, with {BETWEEN} special ones {needed}, "
        f"more than train.max_length={max_length}; raise it, or shorten question, text_pair or answer"
    )
