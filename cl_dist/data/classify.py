"""Encoded rows for a classifier: [CLS] text [SEP] text_pair [SEP] -> class of the task.

For tokenizers without a separator, as most decoders have, a line break separates the texts.

Axes: B rows, L tokens.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cl_dist.data.encoded import LazyExamples, Part, Tokens, padded, real, weights
from cl_dist.data.rows import Row, TaskData


class Encoded(NamedTuple):
    """One row as tokens."""

    ids: Tokens
    types: Tokens | None
    """token_type_ids, if the tokenizer returns them."""
    label: int


class ClassifyRows(LazyExamples[Encoded]):
    """Rows of one or more tasks, numbered consecutively; batches are padded to their longest row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        self._tokenizer, self._max_length = tokenizer, max_length
        self._pad: int = tokenizer.pad_token_id or 0
        alone, both = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        self._separates = both > alone

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task; data.labels[k] is its class k. Replayed rows are treated like others.

        max_length: Longest row of this task in tokens; by default that of the collection.
        """
        self._append(Part(task, data, rows, max_length or self._max_length, replayed))

    def _encode(self, part: Part, rows: Sequence[Row]) -> list[Encoded]:
        pairs = [row.text_pair for row in rows] if rows[0].text_pair is not None else None
        if pairs is not None and not self._separates:
            pairs = [f"\n{pair}" for pair in pairs]
        encoding = self._tokenizer([row.text for row in rows], pairs, truncation=True, max_length=part.max_length)
        types = encoding.get("token_type_ids")
        class_of = {label: number for number, label in enumerate(part.data.labels)}
        return [
            Encoded(
                np.array(ids, dtype=np.int32),
                None if types is None else np.array(types[number], dtype=np.int32),
                class_of[row.label],
            )
            for number, (row, ids) in enumerate(zip(rows, encoding["input_ids"], strict=True))
        ]

    def length(self, number: int) -> int:
        """See EncodedExamples."""
        return len(self.encoded([number])[0].ids)

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch; see `models.classifier.Batch` for its keys and shapes."""
        numbers = real(indices)
        rows = self.encoded(numbers)
        batch = {
            "input_ids": padded([row.ids for row in rows], self._pad),
            "attention_mask": padded([np.ones(len(row.ids), dtype=np.int32) for row in rows], 0),
            "label": torch.tensor([row.label for row in rows]),
            "row": torch.tensor(numbers),
            "task": torch.tensor([self.part(number).task for number in numbers]),
            "weight": weights(indices),
        }
        types = [row.types for row in rows if row.types is not None]
        if types:
            batch["token_type_ids"] = padded(types, 0)
        return {key: value.to(device) for key, value in batch.items()}
