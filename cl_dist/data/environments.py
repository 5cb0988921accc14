"""Rows as a model reads them that looks for rationales: text, then text_pair, with a class and an environment.

An environment is a circumstance under which rows were gathered: what is a good reason in one of them only is none.
Where a task has no column that names it, it is made: rows on whose label a word classifier is mistaken, and the others.
Axes: B rows, L tokens.
"""

import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cl_dist.data.bayes import NaiveBayes
from cl_dist.data.encoded import EncodedExamples, padded, real, weights
from cl_dist.data.language import TextCodec
from cl_dist.data.rows import Row, TaskData
from cl_dist.errors import DataError


def environments(rows: Sequence[Row], count: int) -> list[int]:
    """Return the environment of each row: its column's value among the sorted values, or, without a column, made.

    Made are `count` of equal size, by how surprising a word classifier finds a row's label that has been trained on the
    other half of the rows: they differ in how well words alone foretell the label.

    Raises:
        DataError: If the column has more values than there are environments.
    """
    named = sorted({row.environment for row in rows if row.environment is not None})
    if named:
        if len(named) > count:
            raise DataError(f"method.invrat.environments={count}: the rows name {len(named)}: {', '.join(named)}")
        return [0 if row.environment is None else named.index(row.environment) for row in rows]
    # Halved by their ids' hashes: files often hold labels by turns.
    halves = [hashlib.sha256(row.id.encode()).digest()[0] % 2 for row in rows]
    judges = [
        NaiveBayes((r.text, r.label) for r, half in zip(rows, halves, strict=True) if half != own) for own in (0, 1)
    ]
    surprise = [judges[half].surprise(row.text, row.label) for row, half in zip(rows, halves, strict=True)]
    ranked = sorted(range(len(rows)), key=lambda number: (surprise[number], number))
    place = {number: at for at, number in enumerate(ranked)}
    return [place[number] * count // len(rows) for number in range(len(rows))]


class RationaleExamples(EncodedExamples):
    """The encoded rows of one task, numbered through; batches are padded to their longest row."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, num_environments: int | None = None
    ) -> None:
        """Begin an empty collection; without a number of environments all rows are in the first one."""
        self._codec, self._max_length, self._num = TextCodec(tokenizer), max_length, num_environments
        self._tokens: list[list[int]] = []
        self._contexts: list[int] = []
        self.places: list[list[tuple[int, int]]] = []
        """Of each row, the [start, end) characters of its text that the tokens of the text stand for."""
        self._labels: list[int] = []
        self._environments: list[int] = []
        self._tasks: list[int] = []

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task. The end of a text that is too long is cut off, never its text_pair.

        max_length: Longest row of this task in tokens, where it is not that of the collection.
        """
        class_of = {label: number for number, label in enumerate(data.labels)}
        where = [0] * len(rows) if self._num is None else environments(rows, self._num)
        for row, environment in zip(rows, where, strict=True):
            text, places = self._codec.encode_places(row.text)
            pair = self._codec.encode(row.text_pair or "")
            room = max((max_length or self._max_length) - len(pair), 1)
            self._tokens.append([*text[:room], *pair])
            self._contexts.append(min(len(text), room))
            self.places.append(places[:room])
            self._labels.append(class_of[row.label])
            self._environments.append(environment)
            self._tasks.append(task)

    def __len__(self) -> int:
        return len(self._tokens)

    def length(self, number: int) -> int:
        """See NumberedRows."""
        return len(self._tokens[number])

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch.

        input_ids (B, L); length, context (B,): its tokens, and how many of them, from the first, are the text's; label,
        environment, row, task (B,) int64; weight (B,) float32.
        """
        rows = real(indices)
        batch = {
            "input_ids": padded([self._tokens[row] for row in rows], 0),
            "length": torch.tensor([len(self._tokens[row]) for row in rows]),
            "context": torch.tensor([self._contexts[row] for row in rows]),
            "label": torch.tensor([self._labels[row] for row in rows]),
            "environment": torch.tensor([self._environments[row] for row in rows]),
            "row": torch.tensor(rows),
            "task": torch.tensor([self._tasks[row] for row in rows]),
            "weight": weights(indices),
        }
        return {key: value.to(device) for key, value in batch.items()}
