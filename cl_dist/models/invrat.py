"""InvRat's three players: a selector of words, and two predictors of the label, one of which knows the environment.

Source: Chang et al. 2020, "Invariant Rationalization", ICML. With z the selection, L_i the loss of the agnostic
predictor and L_e that of the environment-aware one:
    selector: L_i + gap_weight * max(0, L_i - L_e) + its share and its breaks;  predictors: their own loss.
The paper updates the players in turn. Here all are updated in one step, by one backward pass over L_i + L_e: the
gradient of z through L_i is multiplied by 1 + gap_weight * [L_i > L_e], through L_e by -gap_weight * [L_i > L_e]. Gap
and share are per row rather than per batch, so results do not depend on the assignment to workers (DECISIONS).
Axes: B rows, L tokens, H width of the embeddings, S units of a player, E environments, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cl_dist.models.classifier import Batch

AGNOSTIC, AWARE, RIGHT, SHARE, BREAKS = range(5)
"""Columns of the output of Players."""


class Reader(nn.Module):
    """A bidirectional GRU over projected embeddings: (B, L, W) -> (B, L, 2 S), -inf after a row's end."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, size)
        self.gru = nn.GRU(size, size, batch_first=True, bidirectional=True)

    def forward(self, x_BLW: Tensor, length_B: Tensor) -> Tensor:
        """Encode rows; a row's result does not depend on its padding."""
        packed = pack_padded_sequence(self.narrow(x_BLW), length_B.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = self.gru(packed)
        read_BLS: Tensor = pad_packed_sequence(
            out, batch_first=True, padding_value=float("-inf"), total_length=x_BLW.shape[1]
        )[0]
        return read_BLS


class Guesser(nn.Module):
    """Predicts the label from the selected words: a reader, the maximum over time, a linear layer."""

    def __init__(self, width: int, size: int, classes: int) -> None:
        super().__init__()
        self.reader = Reader(width, size)
        self.head = nn.Linear(2 * size, classes)

    def forward(self, x_BLW: Tensor, length_B: Tensor) -> Tensor:
        """Return logits (B, K)."""
        logits_BK: Tensor = self.head(self.reader(x_BLW, length_B).amax(1))
        return logits_BK


class Players(nn.Module):
    """Maps a batch of `data.environments` to (B, 5) float32: the columns named above.

    The share is |selected tokens / tokens of the text - share|; breaks are the mean |z_t - z_{t-1}| over the text.
    """

    def __init__(
        self, embedding: Tensor, *, size: int, classes: int, environments: int, share: float, gap_weight: float
    ) -> None:
        """Create the players with a frozen embedding (V, H)."""
        super().__init__()
        width = embedding.shape[1]
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.selector, self.choice = Reader(width, size), nn.Linear(2 * size, 2)
        self.agnostic = Guesser(width, size, classes)
        self.aware = Guesser(width + environments, size, classes)
        self._environments, self._share, self._gap_weight = environments, share, gap_weight

    def _selected(self, x_BLH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return z (B, L), 1 for selected tokens, and the mask of the text's tokens; text_pair is always visible."""
        read_BLS = self.selector(x_BLH, batch["length"])
        is_text_BL = torch.arange(x_BLH.shape[1], device=x_BLH.device) < batch["context"][:, None]
        soft_BL = self.choice(read_BLS.where(read_BLS.isfinite(), 0)).float().softmax(-1)[..., 1]
        hard_BL = (soft_BL > 0.5).float()
        return hard_BL + (soft_BL - soft_BL.detach()), is_text_BL

    def _embedded(self, batch: Batch) -> Tensor:
        x_BLH: Tensor = self.embedding(batch["input_ids"])
        return F.layer_norm(x_BLH, x_BLH.shape[-1:])

    @torch.no_grad()
    def select(self, batch: Batch) -> Tensor:
        """Return which tokens of the text are selected: (B, L) bool."""
        z_BL, is_text_BL = self._selected(self._embedded(batch), batch)
        return (z_BL > 0.5) & is_text_BL

    def forward(self, batch: Batch) -> Tensor:
        """Return the five columns of every row: (B, 5)."""
        x_BLH = self._embedded(batch)
        z_BL, is_text_BL = self._selected(x_BLH, batch)
        text_BL = is_text_BL.to(z_BL.dtype)
        seen_BL = z_BL * text_BL + (1 - text_BL)
        context_B = text_BL.sum(1)
        share_B = ((z_BL * text_BL).sum(1) / context_B - self._share).abs()
        breaks_B = ((z_BL[:, 1:] - z_BL[:, :-1]).abs() * text_BL[:, 1:]).sum(1) / context_B

        factor: dict[str, Tensor] = {}
        agnostic_BL, aware_BL = seen_BL.clone(), seen_BL.clone()
        if seen_BL.requires_grad:
            agnostic_BL.register_hook(lambda gradient: gradient * factor["agnostic"])
            aware_BL.register_hook(lambda gradient: gradient * factor["aware"])
        where_BLE = F.one_hot(batch["environment"], self._environments)[:, None].expand(-1, x_BLH.shape[1], -1)
        aware_BLW = torch.cat([aware_BL.to(x_BLH)[..., None] * x_BLH, where_BLE.to(x_BLH)], -1)
        logits_BK = self.agnostic(agnostic_BL.to(x_BLH)[..., None] * x_BLH, batch["length"]).float()
        agnostic_B = F.cross_entropy(logits_BK, batch["label"], reduction="none")
        aware_BK = self.aware(aware_BLW, batch["length"]).float()
        aware_B = F.cross_entropy(aware_BK, batch["label"], reduction="none")
        gap_B1 = self._gap_weight * (agnostic_B > aware_B).detach().to(seen_BL)[:, None]
        factor |= {"agnostic": 1 + gap_B1, "aware": -gap_B1}
        right_B = (logits_BK.argmax(-1) == batch["label"]).float()
        columns: Any = [agnostic_B, aware_B, right_B, share_B, breaks_B]
        return torch.stack(columns, -1)
