"""Rows as a classifier reads them: [CLS] text [SEP] text_pair [SEP] -> class of the task.

A tokenizer that knows no separator, as those of most decoders, puts a line break there.

Axes: B rows, L tokens.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cl_dist.data.encoded import EncodedExamples, padded, real, weights
from cl_dist.data.rows import Row, TaskData


class ClassifyRows(EncodedExamples):
    """The encoded rows of one or more tasks, numbered through; batches are padded to their longest row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._pad: int = tokenizer.pad_token_id or 0
        alone, both = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        self._separates = both > alone
        self._ids: list[list[int]] = []
        self._types: list[list[int]] = []
        self._labels: list[int] = []
        self._tasks: list[int] = []

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task; data.labels[k] is its class k. A class learns replayed rows like others.

        max_length: Longest row of this task in tokens, where it is not that of the collection.
        """
        if not rows:
            return
        pairs = [row.text_pair for row in rows] if rows[0].text_pair is not None else None
        if pairs is not None and not self._separates:
            pairs = [f"\n{pair}" for pair in pairs]
        encoded = self._tokenizer(
            [row.text for row in rows], pairs, truncation=True, max_length=max_length or self._max_length
        )
        class_of = {label: number for number, label in enumerate(data.labels)}
        self._ids += encoded["input_ids"]
        self._types += encoded.get("token_type_ids", [])
        self._labels += [class_of[row.label] for row in rows]
        self._tasks += [task] * len(rows)

    def __len__(self) -> int:
        return len(self._ids)

    def length(self, number: int) -> int:
        """See NumberedRows."""
        return len(self._ids[number])

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch; see `models.classifier.Batch` for its keys and shapes."""
        rows = real(indices)
        batch = {
            "input_ids": padded([self._ids[row] for row in rows], self._pad),
            "attention_mask": padded([[1] * len(self._ids[row]) for row in rows], 0),
            "label": torch.tensor([self._labels[row] for row in rows]),
            "row": torch.tensor(rows),
            "task": torch.tensor([self._tasks[row] for row in rows]),
            "weight": weights(indices),
        }
        if self._types:
            batch["token_type_ids"] = padded([self._types[row] for row in rows], 0)
        return {key: value.to(device) for key, value in batch.items()}
