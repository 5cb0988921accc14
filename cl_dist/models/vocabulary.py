"""A language model's vocabulary: rows for special tokens, and logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def extend(model: PreTrainedModel, size: int, known: int, seed: int) -> None:
    """Give a model rows for `size` tokens; those from `known` on start at the mean of the others plus seeded noise.

    A row's initial value depends on its number and the seed alone, whatever the size.
    """
    untyped: Any = model
    if untyped.get_input_embeddings().weight.shape[0] < size:
        untyped.resize_token_embeddings(size, mean_resizing=False)
    tables = [untyped.get_input_embeddings(), untyped.get_output_embeddings()]
    weights = {id(table.weight): table.weight for table in tables}
    for weight in weights.values():  # one where they are tied
        mean_H = weight[:known].float().mean(0)
        for number in range(known, weight.shape[0]):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) & (2**63 - 1))
            weight[number] = mean_H + torch.randn(mean_H.shape, generator=generator) * 0.02


def logits(model: Any, hidden_XH: Tensor) -> Tensor:
    """Return the logits behind last hidden states, in float32: (X, V). Gemma 2 bends them: cap * tanh(x / cap)."""
    found_XV: Tensor = model.get_output_embeddings()(hidden_XH).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return found_XV if cap is None else torch.tanh(found_XV / cap) * cap
