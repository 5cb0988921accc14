"""Rows as an encoder reads them: [CLS] text [SEP] text_pair [SEP] -> class of the task.

Axes: B rows, L tokens.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cl_dist.data.rows import Row, TaskData
from cl_dist.data.sampler import DUMMY


class ClassifyRows:
    """The encoded rows of one or more tasks, numbered through; batches are padded to their longest row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._pad: int = tokenizer.pad_token_id or 0
        self._ids: list[list[int]] = []
        self._types: list[list[int]] = []
        self._labels: list[int] = []
        self._tasks: list[int] = []

    def add(self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False) -> None:
        """Append rows of a task; data.labels[k] is its class k. A class learns replayed rows like others."""
        if not rows:
            return
        pairs = [row.text_pair for row in rows] if rows[0].text_pair is not None else None
        encoded = self._tokenizer([row.text for row in rows], pairs, truncation=True, max_length=self._max_length)
        class_of = {label: number for number, label in enumerate(data.labels)}
        self._ids += encoded["input_ids"]
        self._types += encoded.get("token_type_ids", [])
        self._labels += [class_of[row.label] for row in rows]
        self._tasks += [task] * len(rows)

    def __len__(self) -> int:
        return len(self._ids)

    def by_length(self, indices: Iterable[int] | None = None) -> list[int]:
        """Return row numbers, all unless some are given, from long to short: batches of neighbours need little padding.

        The largest batch comes first, so that memory that does not suffice is known at once.
        """
        chosen = range(len(self)) if indices is None else [int(index) for index in indices]
        return sorted(chosen, key=lambda index: (-len(self._ids[index]), index))

    def units(self, indices: Collection[int]) -> dict[str, float]:
        """Return what the sums of a loss over these rows are divided by, by term: none but their number."""
        return {}

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch; see `models.classifier.Batch` for its keys and shapes."""
        real = [0 if index == DUMMY else int(index) for index in indices]
        length = max(len(self._ids[index]) for index in real)
        batch = {
            "input_ids": self._padded(self._ids, real, length, self._pad),
            "attention_mask": torch.tensor(
                [[1] * len(self._ids[i]) + [0] * (length - len(self._ids[i])) for i in real]
            ),
            "label": torch.tensor([self._labels[index] for index in real]),
            "row": torch.tensor(real),
            "task": torch.tensor([self._tasks[index] for index in real]),
            "weight": torch.tensor([0.0 if index == DUMMY else 1.0 for index in indices]),
        }
        if self._types:
            batch["token_type_ids"] = self._padded(self._types, real, length, 0)
        return {key: value.to(device) for key, value in batch.items()}

    @staticmethod
    def _padded(values: list[list[int]], indices: Sequence[int], length: int, fill: int) -> Tensor:
        return torch.tensor([values[i] + [fill] * (length - len(values[i])) for i in indices])
