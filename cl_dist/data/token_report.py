"""Report of a tokenizer on rows: texts without tokens, tokens without an embedding, and the share of unknown tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from cl_dist.data.rows import SPLITS, Row, TaskData, Where
from cl_dist.data.sources import Fault
from cl_dist.data.tasks import TaskConfig

_CHUNK = 4096
MAX_UNKNOWN = 0.5
"""Share of unknown tokens above which a warning is issued."""


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Faults and unknown tokens of the rows of a task."""

    faults: tuple[Fault, ...]
    unknown: float
    """Share of unknown tokens in the texts of the train rows."""

    def warning(self, tokenizer: str) -> str | None:
        """Return a warning, if most tokens are unknown."""
        if self.unknown <= MAX_UNKNOWN:
            return None
        return (
            f"{self.unknown:.0%} of the tokens of the train rows are unknown to the tokenizer of {tokenizer!r}; check "
            "that it belongs to this model and supports this language"
        )


def build_report(
    task: TaskConfig, data: TaskData, tokenizer: Any, max_length: int, embeddings: int | None = None
) -> TokenReport:
    """Check all rows of a task; embeddings is the size of the backbone's embedding, None if it can be extended."""
    faults: list[Fault] = []
    unknown = total = 0
    for split in SPLITS:
        for row, column, tokens in _parts(task, data.rows(split), tokenizer, max_length):
            if (message := _fault(task, row, column, tokens, tokenizer, embeddings)) is not None:
                where = row.where or Where(f"row {row.id}", None)
                faults.append(Fault(where.file, where.line, column, message, where.unit))
            if split == "train" and column == task.text and tokenizer.unk_token_id is not None:
                unknown += tokens.count(tokenizer.unk_token_id)
                total += len(tokens)
    return TokenReport(tuple(faults), unknown / max(total, 1))


def unreadable(
    task: TaskConfig, rows: Sequence[Row], tokenizer: Any, max_length: int, embeddings: int | None = None
) -> Iterator[tuple[Row, str, str]]:
    """Yield (row, column, message) for each text that the tokenizer cannot encode or the backbone cannot embed."""
    for row, column, tokens in _parts(task, rows, tokenizer, max_length):
        if (message := _fault(task, row, column, tokens, tokenizer, embeddings)) is not None:
            yield row, column, message


def _parts(
    task: TaskConfig, rows: Sequence[Row], tokenizer: Any, max_length: int
) -> Iterator[tuple[Row, str, list[int]]]:
    """Yield (row, column, tokens) for every text of the rows."""
    yield from zip(rows, repeat(task.text), _tokens(tokenizer, [row.text for row in rows], max_length))
    if task.text_pair is not None:
        pairs = [row.text_pair or "" for row in rows]
        yield from zip(rows, repeat(task.text_pair), _tokens(tokenizer, pairs, max_length))


def _fault(
    task: TaskConfig, row: Row, column: str, tokens: list[int], tokenizer: Any, embeddings: int | None
) -> str | None:
    if not tokens and column == task.text:
        return f"the tokenizer encodes {row.text!a:.60} as no token"
    if embeddings is None or (largest := max(tokens, default=0)) < embeddings:
        return None
    name = tokenizer.convert_ids_to_tokens(largest)
    return f"contains {name!a}, token {largest} of the tokenizer, but the model's embedding has {embeddings} rows"


def _tokens(tokenizer: Any, texts: Sequence[str], max_length: int) -> Iterator[list[int]]:
    for start in range(0, len(texts), _CHUNK):
        yield from tokenizer(
            texts[start : start + _CHUNK],
            add_special_tokens=False,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
