"""A language model's vocabulary: rows for special tokens, and logits.

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
    """Give a model rows for `size` tokens; those from `known` on start at the mean of the others plus seeded noise.

    A row's initial value depends on its number and the seed alone, whatever the size, and on the mean of what the other
    rows are in the forward pass, whose precision dtype is: they may be held in float32 or in that. Tables that ZeRO-3
    has cut up over the ranks are whole afterwards, and it is a collective then.
    """
    untyped: Any = model
    _gather_tables(untyped.get_input_embeddings(), untyped.get_output_embeddings())
    if untyped.get_input_embeddings().weight.shape[0] < size:
        untyped.resize_token_embeddings(size, mean_resizing=False)
    for weight in _tables(model):
        weight[known:] = _initial_rows(weight, known, weight.shape[0], seed, dtype)
    _zero_bias(model, known, None)


def _gather_tables(*tables: nn.Module) -> None:
    """Give tables that are cut up whole weights, tied ones the same."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for table in tables:
        for name, parameter in list(table.named_parameters(recurse=False)):
            if not is_partitioned(parameter):
                continue
            if parameter not in made:
                with gathered(parameter) as values:
                    made[parameter] = nn.Parameter(values.to("cpu", copy=True))
            setattr(table, name, made[parameter])


def _zero_bias(model: Any, first: int, stop: int | None) -> None:
    """Let the head say nothing of some tokens but what it reads: Phi's has a bias."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias[first:stop] = 0


def _tables(model: Any) -> list[nn.Parameter]:
    """Return the weights of the input and output embeddings: one where they are tied."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(table.weight): table.weight for table in tables}.values())


def _initial_rows(weight: Tensor, known: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return initial rows known..size-1 of a table whose first `known` rows have been learned, float32."""
    mean_H = weight[:known].to(dtype).float().mean(0)
    if weight.is_meta:
        return mean_H.expand(size - known, -1)
    mean_H, rows = mean_H.cpu(), []
    for number in range(known, size):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) & (2**63 - 1))
        rows.append(mean_H + torch.randn(mean_H.shape, generator=generator) * 0.02)
    return torch.stack(rows) if rows else mean_H.expand(0, -1)


class TrainableRows(nn.Module):
    """Rows of tokens from `first` on that are trained, in front of a table that is not."""

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
        """Return the logits behind hidden states: (X, V)."""
        known_XV = self.base(hidden_XH)[..., : self.first]
        return torch.cat([known_XV, F.linear(hidden_XH, self.rows).to(known_XV)], -1)


@torch.no_grad()
def add_trainable_rows(
    model: PreTrainedModel, size: int, known: int, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """As `extend`, but the new rows are parameters of their own, and the tables stay as they are.

    The tables may be cut up over the ranks by ZeRO-3: then a collective.
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
    """Write rows of their own, where there are any, into the tables: a plain model again."""
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
    """Return the logits behind last hidden states, in float32: (X, V). Gemma 2 bends them: cap * tanh(x / cap)."""
    found_XV: Tensor = model.get_output_embeddings()(hidden_XH).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return found_XV if cap is None else torch.tanh(found_XV / cap) * cap
