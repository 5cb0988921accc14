"""Gradient rationales: the tokens of a text to whose embeddings a model's answer is most sensitive.

Source: gradient x input, Simonyan et al. 2014 ("Deep inside convolutional networks") and Shrikumar et al. 2017.
"""

from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cl_dist.models.backbone import device_of
from cl_dist.models.vocabulary import logits


def salient(
    model: PreTrainedModel, context: int, prefix: list[int], ans: int, answer: list[int], share: float
) -> NDArray[np.bool_]:
    """Return the mask of the most salient of the first `context` tokens: the given share of them, at least one.

    A token's weight is |sum over the embedding of gradient * input| of the answer's cross-entropy; ties: the earlier.
    """
    tokens_L = torch.tensor([*prefix, ans, *answer], device=device_of(model))
    weight_T = sensitivity(model, tokens_L, len(prefix))[:context].cpu().numpy()
    chosen = np.zeros(context, dtype=bool)
    chosen[np.argsort(-weight_T, kind="stable")[: max(1, ceil(share * context))]] = True
    return chosen


def sensitivity(model: PreTrainedModel, tokens_L: Tensor, first: int) -> Tensor:
    """Return |sum over the embedding of gradient * input| of each token (L,), for the tokens after `first` as answer.

    Call it outside `watched` and on a frozen model: otherwise autograd saves more tensors for the same result.
    """
    untyped: Any = model  # the library's methods are untyped
    with torch.enable_grad():
        input_LH = untyped.get_input_embeddings()(tokens_L[None]).detach().requires_grad_(True)
        hidden_AH = untyped.base_model(inputs_embeds=input_LH, use_cache=False).last_hidden_state[0, first:-1]
        loss = F.cross_entropy(logits(untyped, hidden_AH), tokens_L[first + 1 :], reduction="sum")
        (gradient_LH,) = torch.autograd.grad(loss, input_LH)
    return (gradient_LH * input_LH.detach())[0].float().sum(-1).abs()


def agreement(found: NDArray[np.bool_], human: NDArray[np.bool_]) -> dict[str, float]:
    """Return token F1 and IoU of two rationales, at least one of which is not empty."""
    both, either = int((found & human).sum()), int((found | human).sum())
    return {"f1": 2 * both / (both + either), "iou": both / either}
