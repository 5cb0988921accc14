"""Gradient x input, checked on a model whose answer hangs on one token, and against finite differences."""

from typing import Any

import numpy as np
import pytest
import torch

from cl_dist.models.cci import watched
from cl_dist.models.saliency import agreement, salient
from tests.cl_dist.models.test_decode import decoder

PREFIX, ANS, ANSWER = [3, 1, 4, 1, 5, 9, 2, 6], 20, [7, 8]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_are_those_of_finite_differences(kind: str) -> None:
    """Scaling one embedding by 1 + h moves the loss by h * gradient . input."""
    model: Any = decoder(kind).double()
    ids = torch.tensor([[*PREFIX, ANS, *ANSWER]])
    table = model.get_input_embeddings()

    @torch.no_grad()
    def loss(place: int, h: float) -> float:
        embedded = table(ids).clone()
        embedded[0, place] *= 1 + h
        logits = model(inputs_embeds=embedded).logits[0, len(PREFIX) : -1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, len(PREFIX) + 1 :], reduction="sum"))

    moves = np.array([abs(loss(t, 1e-4) - loss(t, -1e-4)) for t in range(6)])
    for count in (1, 2, 3):
        with watched(model) if count == 2 else torch.enable_grad():  # the same through the attention that is watched
            found = salient(model, 6, PREFIX, ANS, ANSWER, share=count / 6)
        assert set(np.flatnonzero(found)) == set(np.argsort(-moves)[:count])


def test_a_share_is_rounded_up_and_never_empty() -> None:
    model = decoder("gpt2")
    assert [int(salient(model, 6, PREFIX, ANS, ANSWER, share).sum()) for share in (0.01, 0.2, 0.5, 1.0)] == [1, 2, 3, 6]


def test_agreement_is_f1_and_iou() -> None:
    found, human = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert agreement(found, human) == {"f1": pytest.approx(0.5), "iou": pytest.approx(1 / 3)}
