"""Encoded rows for a language model: context, question and answer as token ids.

With g the token that requests a sample, C context, Q question, A answer:
    question  C Q ans A        labels from `ans` on: A eos
    sample    g C Q ans A      labels everywhere: C Q ans A eos
The special tokens are ids after the tokenizer's vocabulary, not strings that a text could contain: rows are composed
of ids and parsed by them.
Source: Sun et al. 2020 (LAMOL), section 3. The parts are encoded separately. A row that is too long is truncated at the
end of its context, never in its question or answer.
Axes: B rows, S = B or 2 B sequences, L tokens, N positions that have a label.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cl_dist.data.encoded import LazyExamples, Part, Tokens, real, weights
from cl_dist.data.rows import Row, TaskData
from cl_dist.errors import DataError
from cl_dist.tokens import num_ids

QA, LM = 0, 1
"""The two loss terms that a label may belong to."""

BETWEEN = 2
"""Tokens of a sequence in addition to context, question and answer: `ans`, and the token that requests a sample."""

_FIXED = 4  # special tokens that do not depend on the tasks


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the special tokens. base is the first id that the tokenizer does not use."""

    base: int
    eos: int
    """The tokenizer's end-of-text token, or an added one if it has none."""

    @property
    def ans(self) -> int:
        """Separator of question and answer."""
        return self.base

    @property
    def pad(self) -> int:
        """Padding."""
        return self.base + 1

    @property
    def gen(self) -> int:
        """Requests a sample of any task."""
        return self.base + 2

    def task(self, number: int) -> int:
        """Requests a sample of one task."""
        return self.base + _FIXED + number

    def names(self, num_tasks: int, spare: int) -> list[str]:
        """Return the names of the tokens for adding them to a tokenizer, in order."""
        tasks = self.size(num_tasks, spare) - self.task(0)
        return ["<ans>", "<fill>", "<gen>", "<end>", *(f"<task-{number}>" for number in range(tasks))]

    def size(self, num_tasks: int, spare: int) -> int:
        """Return the vocabulary size with tokens for num_tasks tasks, in blocks of `spare` so that it rarely grows."""
        return self.base + _FIXED + spare * -(-max(num_tasks, 1) // spare)


def special(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return the special tokens for a tokenizer."""
    base = num_ids(tokenizer)
    return SpecialTokens(base, base + 3 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id))


class TextCodec:
    """Conversion between text and token ids, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.special = tokenizer, special(tokenizer)
        bare, spaced = (self._ids(text) for text in ("a", " a"))
        # Byte-level vocabularies merge a leading space into the word; others encode it as a separate token.
        self.lead = " " if len(bare) == len(spaced) else ""
        """Prefix of each part of a row."""

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a part of a row."""
        text = text.strip()
        return self._ids(self.lead + text) if text else []

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text as a part of a row."""
        stripped = [text.strip() for text in texts]
        if not stripped:
            return []
        found = self._tokenizer([self.lead + text for text in stripped], add_special_tokens=False)["input_ids"]
        return [len(tokens) if text else 0 for text, tokens in zip(stripped, found, strict=True)]

    def show(self, tokens: Iterable[int]) -> str:
        """Return the vocabulary entries of tokens, separated by spaces."""
        return " ".join(str(token) for token in self._tokenizer.convert_ids_to_tokens(list(tokens)))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a part of a row, and the [start, end) characters of each."""
        cut = len(text) - len(text.lstrip())
        shift = cut - len(self.lead)
        encoding = self._tokenizer(self.lead + text.strip(), add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(max(start + shift, cut), max(end + shift, cut)) for start, end in encoding["offset_mapping"]]
        return list(encoding["input_ids"]), offsets

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, without special ones."""
        own = [token for token in tokens if token < self.special.base and token != self.special.eos]
        return str(self._tokenizer.decode(own, clean_up_tokenization_spaces=False)).strip()


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One row as tokens."""

    prefix: Tokens
    """Context and question."""
    answer: Tokens
    task: int
    replayed: bool

    def __len__(self) -> int:
        return len(self.prefix) + len(self.answer) + BETWEEN


def full_question(row: Row, question: str) -> str:
    """Return the question of a row: its text_pair, if it has one, and its task's question."""
    return " ".join(part for part in (row.text_pair, question) if part)


def encode_row(
    codec: TextCodec, row: Row, question: str, max_length: int, reserved: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Return (context, question, answer) of a row as tokens.

    reserved: Tokens to reserve for an answer that is still to be generated.

    Raises:
        DataError: If question and answer alone are too long.
    """
    context, answer = codec.encode(row.text), codec.encode(row.label)
    encoded_question = codec.encode(full_question(row, question))
    taken = len(encoded_question) + max(len(answer), reserved)
    room = max_length - taken - BETWEEN
    if room < 0:
        raise DataError(
            f"row {row.id}: question and answer have {taken} tokens, but train.max_length={max_length} leaves room "
            f"for {max_length - BETWEEN}; increase it"
        )
    return context[:room], encoded_question, answer


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """How LanguageRows lays out its rows."""

    samples: bool = False
    """Whether a batch holds every row as a sample too."""
    per_task: bool = True
    """Whether each task has a token of its own that asks for a sample."""
    ans_weight: float = 1.0
    """Weight of the label `ans` within a sample."""


class LanguageRows(LazyExamples[EncodedText]):
    """Rows of one or more tasks, numbered consecutively; batches are padded to their longest row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        samples: bool = False,
        per_task: bool = True,
        ans_weight: float = 1.0,
    ) -> None:
        """Create an empty collection.

        Args:
            tokenizer: Encodes the rows.
            max_length: Longest sequence in tokens.
            samples: Whether a batch also has every row as a sample.
            per_task: Whether each task has its own token that requests a sample.
            ans_weight: Weight of the label `ans` in a sample.
        """
        super().__init__()
        self.codec, self._max_length = TextCodec(tokenizer), max_length
        self._samples, self._per_task, self._ans_weight = samples, per_task, ans_weight
        self._added: list[EncodedText] = []
        """Rows that were added as tokens; numbered after the others."""

    @property
    def special(self) -> SpecialTokens:
        """The special tokens."""
        return self.codec.special

    def add(
        self, task: int, data: TaskData, rows: Sequence[Row], *, replayed: bool = False, max_length: int | None = None
    ) -> None:
        """Append rows of a task; only before `add_tokens`.

        max_length: Longest row of this task in tokens; by default that of the collection.
        """
        assert not self._added, "add() called after add_tokens()"
        self._append(Part(task, data, rows, max_length or self._max_length, replayed))

    def add_tokens(self, task: int, prefix: Sequence[int], answer: Sequence[int], *, replayed: bool = True) -> None:
        """Append a row that is already encoded."""
        self._added.append(EncodedText(_tokens(prefix), _tokens(answer), task, replayed))

    def _encode(self, part: Part, rows: Sequence[Row]) -> list[EncodedText]:
        found = []
        for row in rows:
            context, question, answer = encode_row(self.codec, row, part.data.question, part.max_length)
            found.append(EncodedText(_tokens([*context, *question]), _tokens(answer), part.task, part.replayed))
        return found

    def __len__(self) -> int:
        return super().__len__() + len(self._added)

    def encoded(self, numbers: Sequence[int]) -> list[EncodedText]:
        """See LazyExamples."""
        first = super().__len__()
        texts = iter(super().encoded([number for number in numbers if number < first]))
        return [next(texts) if number < first else self._added[number - first] for number in numbers]

    def length(self, number: int) -> int:
        """See EncodedExamples."""
        return len(self.encoded([number])[0])

    def normalizers(self, indices: Iterable[int]) -> dict[str, float]:
        """Return the divisors of loss terms over these rows: the total weight of their labels, by term."""
        rows = self.encoded([int(index) for index in indices])
        qa = float(sum(len(row.answer) + 1 for row in rows))
        lm = float(sum(len(row.prefix) + len(row.answer) + 1 + self._ans_weight for row in rows))
        return {"qa_loss": qa, "lm_loss": lm}

    def batch(self, indices: Collection[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the rows of these numbers as one batch.

        input_ids (S, L): the questions, then the samples if enabled. place (N,): flat index (S * L) of a position that
        predicts a label; target, owner, part, unit (N,): the label, its row in the batch, QA or LM, its
        weight. row, task (B,) int64; weight, replayed (B,) float32. No attention mask: padding follows every label.
        """
        numbers = real(indices)
        rows = self.encoded(numbers)
        length, parts = max(len(row) for row in rows), (QA, LM) if self._samples else (QA,)
        ids = np.full((len(parts) * len(rows), length), self.special.pad, dtype=np.int64)
        columns: list[tuple[NDArray[Any], ...]] = []
        for part in parts:
            for owner, row in enumerate(rows):
                at = part * len(rows) + owner
                full = np.concatenate([row.prefix, [self.special.ans], row.answer])
                gen = self.special.task(row.task) if self._per_task else self.special.gen
                tokens = full if part == QA else np.concatenate([[gen], full])
                following = np.append(full[1:] if part == QA else full, self.special.eos)
                first = len(row.prefix) if part == QA else 0
                labels = np.ones(len(tokens), dtype=np.float32)
                if part == LM:
                    labels[len(row.prefix)] = self._ans_weight
                ids[at, : len(tokens)] = tokens
                count = len(tokens) - first
                columns.append(
                    (
                        at * length + np.arange(first, len(tokens)),
                        following[first:],
                        np.full(count, owner),
                        np.full(count, part),
                        labels[first:],
                    )
                )
        place, target, owner_N, part_N, unit = (np.concatenate(column) for column in zip(*columns, strict=True))
        batch = {
            "input_ids": torch.from_numpy(ids),
            "place": torch.from_numpy(place),
            "target": torch.from_numpy(target.astype(np.int64)),
            "owner": torch.from_numpy(owner_N),
            "part": torch.from_numpy(part_N),
            "unit": torch.from_numpy(unit),
            "row": torch.tensor(numbers),
            "task": torch.tensor([row.task for row in rows]),
            "replayed": torch.tensor([float(row.replayed) for row in rows]),
            "weight": weights(indices),
        }
        return {key: value.to(device) for key, value in batch.items()}


def _tokens(numbers: Sequence[int]) -> Tokens:
    return np.array(numbers, dtype=np.int32)
