"""A transformer with one classification head per task.

Axes: B rows, L tokens, H hidden units, K classes of the task.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cl_dist.errors import ConfigError
from cl_dist.models.architectures import architecture
from cl_dist.partition import full_shape

Batch = dict[str, Tensor]
"""input_ids, attention_mask and, if the tokenizer returns them, token_type_ids (B, L) int64; label, row, task
(B,) int64; weight (B,) float32, 0 for padding rows of a micro-batch."""


class Classifier(nn.Module):
    """Sentence vector of a backbone, then the head of the active task."""

    def __init__(self, backbone: PreTrainedModel, pooling: str | None) -> None:
        """Take a backbone without a language modelling head; pooling is as in ModelConfig.

        Raises:
            ConfigError: If the architecture is not supported, or has no such sentence vector.
        """
        super().__init__()
        self.backbone = backbone
        self._is_causal = architecture(backbone).is_causal
        self.pooling = pooling or ("last" if self._is_causal else "mean")
        if pooling == "cls" and self._is_causal:
            raise ConfigError(
                f"science.model.pooling='cls': the first token of a {backbone.config.model_type} attends only to "
                "itself, so all rows would have the same vector; set last or mean, or leave it out"
            )
        if pooling == "pooler" and getattr(backbone, "pooler", None) is None:
            raise ConfigError(
                f"science.model.pooling='pooler': a {backbone.config.model_type} has no pooler; set one of "
                "mean, cls, last, or leave it out"
            )
        self.heads = nn.ModuleList()
        self.task: int | None = 0
        """Task whose head is used; None uses the head of each row's own task, batch["task"]."""

    def add_head(self, num_labels: int) -> None:
        """Append the head of the next task, its weights drawn from N(0, 0.02)."""
        head = nn.Linear(self.backbone.config.hidden_size, num_labels)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.heads.append(head)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K) of the active task."""
        vector_BH = self.vectors(batch)
        if self.task is not None:
            return self.heads[self.task](vector_BH)
        outputs = [head(vector_BH) for head in self.heads]
        widest = max(logits_BK.shape[1] for logits_BK in outputs)
        padded = [F.pad(logits_BK, (0, widest - logits_BK.shape[1]), value=-1e9) for logits_BK in outputs]
        return torch.stack(padded, 1)[torch.arange(len(vector_BH), device=vector_BH.device), batch["task"]]

    def vectors(self, batch: Batch) -> Tensor:
        """Return the sentence vectors (B, H)."""
        output = self.backbone(**self._inputs(batch))
        if self.pooling == "pooler":
            pooled: Tensor = output.pooler_output
            return pooled
        return self._pooled(output.last_hidden_state, batch)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the backbone's arguments. A decoder counts positions from a row's first token, after any padding."""
        inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if self._is_causal:
            position_BL = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            return inputs | {"position_ids": position_BL, "use_cache": False}
        return inputs | {key: batch[key] for key in ("token_type_ids",) if key in batch}

    def _pooled(self, hidden_BLH: Tensor, batch: Batch) -> Tensor:
        """Return the sentence vectors (B, H); padding may be on either side."""
        mask_BL = batch["attention_mask"].to(hidden_BLH.device)
        if self.pooling == "mean":
            mask_BL1 = mask_BL[:, :, None].to(hidden_BLH.dtype)
            return (hidden_BLH * mask_BL1).sum(1) / mask_BL1.sum(1)
        if self.pooling == "cls":
            at_B = mask_BL.argmax(1)
        else:
            at_B = (mask_BL * torch.arange(mask_BL.shape[1], device=mask_BL.device)).argmax(1)
        return hidden_BLH[torch.arange(len(at_B), device=at_B.device), at_B]


def cross_entropy(logits_BK: Tensor, batch: Batch) -> Tensor:
    """Return the unreduced cross-entropy of each row, in float32: (B,)."""
    return F.cross_entropy(logits_BK.float(), batch["label"], reduction="none")


def freeze(module: nn.Module) -> None:
    """Freeze every parameter of a module and drop its gradient; optimizers skip parameters without one."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; full sizes if ZeRO-3 has partitioned the model."""
    sizes = [(full_shape(p).numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
