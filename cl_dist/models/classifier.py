"""An encoder with one classification head per task.

Axes: B rows, L tokens, H hidden units, K classes of the task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
"""input_ids, attention_mask and, where the tokenizer gives them, token_type_ids (B, L) int64; label, row, task
(B,) int64; weight (B,) float32, 0 for rows that only fill up a micro-batch."""


class Classifier(nn.Module):
    """Sentence vector of a backbone, then the head of the active task."""

    def __init__(self, backbone: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.heads = nn.ModuleList()
        self.task: int | None = 0
        """Task whose head answers; None answers each row with the head of its own task, batch["task"]."""

    def add_head(self, num_labels: int) -> None:
        """Append the head of the next task, its weights drawn from N(0, 0.02)."""
        head = nn.Linear(self.backbone.config.hidden_size, num_labels)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.heads.append(head)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K) of the active task."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        output = self.backbone(**inputs)
        if self.pooling == "pooler":
            vector_BH = output.pooler_output
        elif self.pooling == "cls":
            vector_BH = output.last_hidden_state[:, 0]
        else:
            mask_BL1 = batch["attention_mask"][:, :, None].to(output.last_hidden_state.dtype)
            vector_BH = (output.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)
        if self.task is not None:
            return self.heads[self.task](vector_BH)
        answers = [head(vector_BH) for head in self.heads]
        widest = max(logits_BK.shape[1] for logits_BK in answers)
        padded = [F.pad(logits_BK, (0, widest - logits_BK.shape[1]), value=-1e9) for logits_BK in answers]
        return torch.stack(padded, 1)[torch.arange(len(vector_BH), device=vector_BH.device), batch["task"]]


def cross_entropy(logits_BK: Tensor, batch: Batch) -> Tensor:
    """Return the unreduced cross-entropy of each row, in float32: (B,)."""
    return F.cross_entropy(logits_BK.float(), batch["label"], reduction="none")


def freeze(module: nn.Module) -> None:
    """Take every parameter of a module out of training."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; of what ZeRO-3 has cut up, the whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
