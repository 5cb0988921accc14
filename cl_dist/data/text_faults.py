"""Faults of rows for a language model: labels that its tokenizer encodes alike, and rows that are too long.

Found before a run starts, not in the stage that first reads such a row.
"""

from collections.abc import Iterable, Iterator, Sequence

from cl_dist.data.language import BETWEEN, TextCodec, full_question
from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.sources import Fault
from cl_dist.data.tasks import TaskConfig

_CHUNK = 4096


def label_faults(labels: Sequence[str], codec: TextCodec) -> list[str]:
    """Return the faults of labels that a model generates: encoded alike, or as no token.

    Labels are compared up to the first end-of-text token, where an answer ends.
    """
    faults = []
    first: dict[tuple[int, ...], str] = {}
    for label in labels:
        tokens = codec.encode(label)
        eos = codec.special.eos
        encoded = tuple(tokens[: tokens.index(eos)] if eos in tokens else tokens)
        if not encoded:
            why = "the end of text" if tokens else "no token"
            faults.append(f"the tokenizer encodes label {label!a} as {why}, so it can never be an answer")
            continue
        other = first.setdefault(encoded, label)
        if other != label:
            shown = codec.show(encoded)
            faults.append(
                f"the tokenizer encodes labels {other!a} and {label!a} alike ({shown}), so one can never be an answer"
            )
    return faults


def length_faults(
    task: TaskConfig, data: TaskData, codec: TextCodec, max_length: int, answered: Iterable[str] = ("test",)
) -> Iterator[Fault]:
    """Yield a fault for each row whose question and answer exceed max_length.

    Rows are encoded as in data.language. The model answers those of the `answered` splits, which need room for the
    longest answer of the train rows; other rows need room for their own answer.
    """
    answers = _lengths(codec, (row.label for row in data.train))
    longest = max(answers.values(), default=0)
    for split in SPLITS:
        rows = data.rows(split)
        is_answered = split in answered
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            questions = _lengths(codec, (full_question(row, data.question) for row in part))
            own = {} if is_answered and split != "dev" else _lengths(codec, (row.label for row in part))
            for row in part:
                question, answer = questions[full_question(row, data.question)], own.get(row.label, 0)
                needed = question + max(answer, longest if is_answered else 0) + BETWEEN
                if needed > max_length:
                    where = row.where or Where(f"row {row.id}", None)
                    message, column = _message(question, needed, max_length), _column(task, row, question, answer)
                    yield Fault(where.file, where.line, column, message, where.unit)


def _lengths(codec: TextCodec, texts: Iterable[str]) -> dict[str, int]:
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, codec.lengths(distinct), strict=True))


def _column(task: TaskConfig, row: Row, question: int, answer: int) -> str | None:
    """Return the column of the longest part: the answer or text_pair; None for the task's question."""
    return task.label if answer > question else task.text_pair if row.text_pair else None


def _message(question: int, needed: int, max_length: int) -> str:
    return (
        f"question and answer have {question} + {needed - question - BETWEEN} tokens ({needed} with special tokens), "
        f"but train.max_length={max_length}; increase it, or shorten question, text_pair or answer"
    )
