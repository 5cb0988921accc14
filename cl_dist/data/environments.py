"""Encoded rows for rationale extraction: text, then text_pair, with a class and an environment.

An environment is a condition under which rows were collected; cues valid in only one environment are ignored. For
tasks without a column of environments, rows are grouped by how well a word classifier predicts their label.
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
    """Return the environment of each row: the rank of its column's value among the sorted values.

    Without a column, returns `count` environments of equal size, ranked by -log p of the row's label under a word
    classifier trained on the other half of the rows: they differ in how well words alone predict the label.

    Raises:
        DataError: If the column has more than `count` values.
    """
    named = sorted({row.environment for row in rows if row.environment is not None})
    if named:
        if len(named) > count:
            raise DataError(f"method.invrat.environments={count}: the rows have {len(named)}: {', '.join(named)}")
        return [0 if row.environment is None else named.index(row.environment) for row in rows]
    # Split in halves by a hash of the id, since labels often alternate in files.
    halves = [hashlib.sha256(row.id.encode()).digest()[0] % 2 for row in rows]
    classifiers = [
        NaiveBayes((r.text, r.label) for r, half in zip(rows, halves, strict=True) if half != own) for own in (0, 1)
    ]
    surprise = [classifiers[half].surprise(row.text, row.label) for row, half in zip(rows, halves, strict=True)]
    ranked = sorted(range(len(rows)), key=lambda number: (surprise[number], number))
    rank = {number: at for at, number in enumerate(ranked)}
    return [rank[number] * count // len(rows) for number in range(len(rows))]


class RationaleExamples(EncodedExamples):
    """Encoded rows of one task, numbered consecutively; batches are padded to their longest row."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, num_environments: int | None = None
    ) -> None:
        """Create an empty collection; without num_environments all rows are in environment 0."""
        self._codec, self._max_length, self._num = TextCodec(tokenizer), max_length, num_environments
        self._tokens: list[list[int]] = []
        self._contexts: list[int] = []
        self.offsets: list[list[tuple[int, int]]] = []
        """For each row, the [start, end) characters of each token of its text."""
        self._labels: list[int] = []
        self._environments: list[int] = []
        self._tasks: list[int] = []

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task. Truncates a row that is too long at the end of its text, never its text_pair.

        max_length: Longest row of this task in tokens; by default that of the collection.
        """
        class_of = {label: number for number, label in enumerate(data.labels)}
        groups = [0] * len(rows) if self._num is None else environments(rows, self._num)
        for row, environment in zip(rows, groups, strict=True):
            text, offsets = self._codec.encode_with_offsets(row.text)
            pair = self._codec.encode(row.text_pair or "")
            room = max((max_length or self._max_length) - len(pair), 1)
            self._tokens.append([*text[:room], *pair])
            self._contexts.append(min(len(text), room))
            self.offsets.append(offsets[:room])
            self._labels.append(class_of[row.label])
            self._environments.append(environment)
            self._tasks.append(task)

    def __len__(self) -> int:
        return len(self._tokens)

    def length(self, number: int) -> int:
        """See EncodedExamples."""
        return len(self._tokens[number])

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch.

        input_ids (B, L); length, context (B,): the number of tokens of the row, and of its text at the start; label,
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
