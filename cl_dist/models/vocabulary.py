"""Vocabulary of a language model: rows for special tokens, and logits.

Axes: B rows, L tokens, H hidden units, V tokens of the vocabulary, X any.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.partition import gathered, is_partitioned


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel, size: int, known: int, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """Resize the vocabulary to `size`; rows from `known` on start at the mean of the others plus seeded noise.

    A row's initial value depends on its index, the seed, and the mean of the other rows in dtype, the precision of the
    forward pass; the stored rows may have that precision or float32. Tables that ZeRO-3 has partitioned are gathered
    and stay full; this is then a collective.
    """
    untyped: Any = model
    _gather_tables(untyped.get_input_embeddings(), untyped.get_output_embeddings())
    if untyped.get_input_embeddings().weight.shape[0] < size:
        untyped.resize_token_embeddings(size, mean_resizing=False)
    for weight in _tables(model):
        weight[known:] = _initial_rows(weight, known, weight.shape[0], seed, dtype)
    _zero_bias(model, known, None)


def _gather_tables(*tables: nn.Module) -> None:
    """Replace partitioned weights of tables by full ones; tied weights stay tied."""
    full: dict[nn.Parameter, nn.Parameter] = {}
    for table in tables:
        for name, parameter in list(table.named_parameters(recurse=False)):
            if not is_partitioned(parameter):
                continue
            if parameter not in full:
                with gathered(parameter) as values:
                    full[parameter] = nn.Parameter(values.to("cpu", copy=True))
            setattr(table, name, full[parameter])


def _zero_bias(model: Any, first: int, stop: int | None) -> None:
    """Set the head's bias of some tokens to zero, if it has one (Phi)."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias[first:stop] = 0


def _tables(model: Any) -> list[nn.Parameter]:
    """Return the weights of the input and output embeddings; a single one if they are tied."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(table.weight): table.weight for table in tables}.values())


def _initial_rows(weight: Tensor, known: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return initial float32 rows known..size-1 of a table whose first `known` rows are pretrained."""
    mean_H = weight[:known].to(dtype).float().mean(0)
    if weight.is_meta:
        return mean_H.expand(size - known, -1)
    mean_H, rows = mean_H.cpu(), []
    for number in range(known, size):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) & (2**63 - 1))
        rows.append(mean_H + torch.randn(mean_H.shape, generator=generator) * 0.02)
    return torch.stack(rows) if rows else mean_H.expand(0, -1)


class TrainableRows(nn.Module):
    """Trainable rows for tokens from `first` on, next to a frozen table."""

    def __init__(self, base: nn.Module, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.first, self.rows = base, first, rows


class TrainableEmbedding(TrainableRows):
    """Input embeddings."""

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return the embeddings of token ids: (B, L, H)."""
        known_BLH = self.base(ids_BL.clamp(max=self.first - 1))
        scale = getattr(self.base, "embed_scale", None)  # Gemma 3
        own_BLH = F.embedding((ids_BL - self.first).clamp(min=0), self.rows).to(known_BLH)
        if scale is not None:
            own_BLH = own_BLH * torch.as_tensor(scale).to(own_BLH)
        return torch.where((ids_BL >= self.first)[..., None], own_BLH, known_BLH)


class TrainableLogits(TrainableRows):
    """The language modelling head."""

    def forward(self, hidden_XH: Tensor) -> Tensor:
        """Return the logits of hidden states: (X, V)."""
        known_XV = self.base(hidden_XH)[..., : self.first]
        return torch.cat([known_XV, F.linear(hidden_XH, self.rows).to(known_XV)], -1)


@torch.no_grad()
def add_trainable_rows(
    model: PreTrainedModel, size: int, known: int, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """As `extend_vocabulary`, but the new rows are separate parameters, and the tables stay frozen.

    A collective if ZeRO-3 has partitioned the tables.
    """
    untyped: Any = model
    embedding, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    rows = []
    for table in (embedding, head):
        with gathered(table.weight) as values:
            rows.append(nn.Parameter(_initial_rows(values, known, size, seed, dtype)))
    if embedding.weight is head.weight:
        rows[1] = rows[0]
    untyped.set_input_embeddings(TrainableEmbedding(embedding, known, rows[0]))
    untyped.set_output_embeddings(TrainableLogits(head, known, rows[1]))


@torch.no_grad()
def merge_trainable_rows(model: PreTrainedModel) -> None:
    """Copy trainable rows, if any, into the tables, to get a plain model."""
    untyped: Any = model
    embedding, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    if not isinstance(embedding, TrainableRows):
        return
    untyped.set_input_embeddings(embedding.base)
    untyped.set_output_embeddings(head.base)
    size = embedding.first + embedding.rows.shape[0]
    if untyped.get_input_embeddings().weight.shape[0] != size:  # padding rows had no logits
        untyped.resize_token_embeddings(size, mean_resizing=False)
    for table, own in ((untyped.get_input_embeddings(), embedding), (untyped.get_output_embeddings(), head)):
        table.weight[own.first : size] = own.rows
    _zero_bias(model, embedding.first, size)


def logits(model: Any, hidden_XH: Tensor) -> Tensor:
    """Return the float32 logits of last hidden states: (X, V). Gemma 2 caps them: cap * tanh(x / cap)."""
    found_XV: Tensor = model.get_output_embeddings()(hidden_XH).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return found_XV if cap is None else torch.tanh(found_XV / cap) * cap
