"""Changes to gradients that a method asks for: penalties on parameters, and linear transforms of their gradients.

Both are plain objects that a learner names by parameter. The engine applies them under plain torch and under every ZeRO
stage, so a method never touches `parameter.grad`, which ZeRO empties.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Penalty(Protocol):
    """A term of the loss that depends on one parameter alone, given by its gradient.

    The engine adds the gradient once per optimizer step, after the gradients of all ranks are reduced and before they
    are clipped. Every rank calls it with the same value, so it must be a pure function of that value.
    """

    def gradient(self, value: Tensor) -> Tensor:
        """Return the gradient at a parameter's value, in the value's shape, type and device.

        value is the whole float32 parameter, also where ZeRO partitions it or the forward pass rounds it.
        """

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that the penalty keeps, which count into the memory estimate."""


@dataclass(frozen=True, slots=True)
class QuadraticPenalty:
    """strength / 2 * (value - anchor)^2, elementwise."""

    strength: Tensor | float
    anchor: Tensor

    def gradient(self, value: Tensor) -> Tensor:
        """See Penalty."""
        strength = self.strength.to(value) if isinstance(self.strength, Tensor) else self.strength
        return strength * (value - self.anchor.to(value))

    def tensors(self) -> Iterable[Tensor]:
        """See Penalty."""
        return [self.anchor, *([self.strength] if isinstance(self.strength, Tensor) else [])]


class GradientTransform(Protocol):
    """A linear map of one parameter's gradient: a mask, a factor, a projection onto a subspace.

    The engine applies it to every micro-batch's gradient as the backward pass produces it, whole, on each rank. Only a
    linear map that is equal on all ranks and constant within a stage commutes with accumulation and with ZeRO's
    reductions, so the result is that of transforming the global batch's gradient.

    AdamW divides each entry by its own root mean square: a mask survives that to the bit, a projection onto another
    subspace does not.
    """

    @property
    def decay(self) -> bool:
        """Whether weight decay goes on for the entries that may move.

        AdamW decays whole parameters, so the engine puts frozen entries back after every step. Where this is False the
        whole parameter is kept out of weight decay.
        """

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the transformed gradient, in the gradient's shape, type and device."""

    def frozen(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Return which entries of a parameter must keep every bit (bool, of this shape); None if there are none."""


@dataclass(frozen=True, slots=True)
class GradScale:
    """An elementwise factor: scale * max(row[:, None], column[None, :]). Entries of factor 0 are frozen."""

    row: Tensor | None = None
    column: Tensor | None = None
    scale: float = 1.0
    decay: bool = False
    """See GradientTransform."""

    def factor(self, like: Tensor) -> Tensor:
        """Return the factor in the shape, type and device of a gradient."""
        row, column = self.row, self.column
        if row is None:
            return torch.full_like(like, self.scale)
        keep = row if like.dim() == 1 else row[:, None] if column is None else torch.maximum(row[:, None], column)
        return (keep * self.scale).to(like).expand_as(like)

    def apply(self, gradient: Tensor) -> Tensor:
        """See GradientTransform."""
        return gradient * self.factor(gradient)

    def frozen(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """See GradientTransform."""
        return None if self.row is None and self.scale else self.factor(torch.empty(shape, device=device)) == 0


def frozen_entries(transform: GradientTransform, value: Tensor) -> Tensor:
    """Return which entries of a whole parameter a transform freezes (bool, of the value's shape)."""
    found = transform.frozen(value.shape, value.device)
    return torch.zeros_like(value, dtype=torch.bool) if found is None else found
