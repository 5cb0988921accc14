"""Causal language model for training: losses at labelled positions only.

Axes: S sequences, L tokens, H hidden units, N labels, V tokens of the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cl_dist.models.vocabulary import logits

CHUNK = 2048
"""Labels whose logits are computed at a time: with a vocabulary of 50,000, a batch's logits dominate the memory."""
LOSS, RIGHT, DISTANCE = 0, 1, 2
"""Columns of the output of CausalModel."""


class CausalModel(nn.Module):
    """Maps a batch of `data.language` to one row per label: (N, 3) float32.

    Its columns: cross-entropy; 1 where the label is the likeliest token, else 0; Kullback-Leibler divergence of the
    prediction from the teacher's, 0 without a teacher.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self._teacher: list[Any] = []  # in a list, so that it is not a submodule

    def teach(self, teacher: Any) -> None:
        """Set the teacher for distillation, or remove it with None."""
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the three columns of every label: (N, 3)."""
        hidden_NH = _hidden(self.backbone, batch)
        teacher = self._teacher[0] if self._teacher and self.training else None
        teacher_NH = None
        if teacher is not None:
            with torch.no_grad():
                teacher_NH = _hidden(teacher.to(batch["place"].device), batch)
        parts = []
        for first in range(0, len(hidden_NH), CHUNK):
            here = slice(first, first + CHUNK)
            teacher_CV = None
            if teacher is not None and teacher_NH is not None:
                with torch.no_grad():
                    teacher_CV = logits(teacher, teacher_NH[here]).log_softmax(-1)
            inputs = (self.backbone, hidden_NH[here], batch["target"][here], teacher_CV)
            if len(hidden_NH) > CHUNK and torch.is_grad_enabled():
                parts.append(checkpoint(_compare, *inputs, use_reentrant=False))  # recomputes logits in backward
            else:
                parts.append(_compare(*inputs))
        return torch.cat(parts)


def _hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states at the labelled positions: (N, H)."""
    hidden_SLH = model.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    chosen: Tensor = hidden_SLH.flatten(0, 1)[batch["place"]]
    return chosen


def _compare(backbone: nn.Module, hidden_CH: Tensor, target_C: Tensor, teacher_CV: Tensor | None) -> Tensor:
    logits_CV = logits(backbone, hidden_CH)
    log_CV = logits_CV.log_softmax(-1)
    loss_C = F.nll_loss(log_CV, target_C, reduction="none")
    right_C = (logits_CV.argmax(-1) == target_C).float()
    distance_C = torch.zeros_like(loss_C) if teacher_CV is None else (teacher_CV.exp() * (teacher_CV - log_CV)).sum(-1)
    return torch.stack([loss_C, right_C, distance_C], -1)


def per_row(values_N: Tensor, batch: dict[str, Tensor], part: int) -> Tensor:
    """Return the weighted sum over each row's labels of one part: (B,)."""
    chosen_N = values_N * batch["unit"] * (batch["part"] == part)
    return torch.zeros_like(batch["weight"]).index_add(0, batch["owner"], chosen_N)
