"""How far bfloat16 is from float32: CTR in decoders, and the statistics that votes are made of.

The bounds are about twice what was measured on these tiny models (logits 0.044 of their spread, attention 0.026).
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_dist.models.attention_slices import units_of
from cl_dist.models.backbone import lower
from cl_dist.models.cci import Comparer, Recorder, watch, watched
from cl_dist.models.gates import Gate
from tests.architectures import DECODERS, IDS, hidden, tiny
from tests.cl_dist.models.test_architectures import Maps
from tests.cl_dist.models.test_cci import BETA, TEXTS, drifted, mask
from tests.cl_dist.models.test_decode import decoder
from tests.cl_dist.models.test_decoder_plugins import BATCHES, learner_of, logits
from tests.encoders import batch_of, train

each_decoder = pytest.mark.parametrize("kind", DECODERS)


@each_decoder
def test_ctr_on_a_decoder_answers_in_bfloat16_as_in_float32(kind: str) -> None:
    learner, batch = learner_of("ctr", kind), batch_of(seed=9)
    for task in (0, 1):
        train(learner, task, BATCHES[3 * task : 3 * task + 3])
    exact = [logits(learner, task, batch) for task in (0, 1)]
    gates = torch.stack(learner.model.context.gates)
    masks = learner.model.masks()
    lower(learner.model)
    for task, expected in enumerate(exact):
        found = logits(learner, task, batch)
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() <= 0.1 * expected.std()
    same = (torch.stack(learner.model.context.gates) == gates).float().mean()
    assert same >= 0.9  # a gate whose two logits are nearer than rounding may go either way
    torch.testing.assert_close(learner.model.masks(), masks, rtol=0, atol=0)


def test_masks_and_router_decisions_are_float32_islands() -> None:
    learner = learner_of("ctr", "llama")
    lower(learner.model)
    learner.start_task(1, (1,))
    learner.model.context.slope = 5.0
    learner.model(batch_of())
    assert all(mask.dtype == used.dtype == torch.float32 for mask, used in learner.model.context.masks)
    assert all(gate.dtype == torch.float32 for gate in learner.model.context.gates)
    assert learner.model.sparsity().dtype == torch.float32
    learner.model.sparsity().backward()
    assert all(gate.grad.dtype == torch.bfloat16 for plugin in learner.model.plugins for gate in plugin.gates(1))
    assert Gate.apply(torch.full((1,), 0.1, dtype=torch.bfloat16), 100.0, 100.0).item() < 1


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma3_text"])
@torch.no_grad()
def test_tokens_far_apart_are_turned_exactly(kind: str) -> None:
    far: dict[str, Any] = {"position_ids": 1000 * torch.arange(20)[None]}
    plain: Any = tiny(kind)
    expected = plain(IDS, **far).last_hidden_state
    size = expected.abs().mean()
    lowered: Any = lower(tiny(kind))
    rounded: Any = tiny(kind).to(torch.bfloat16)  # type: ignore[arg-type]
    errors = [float((m(IDS, **far).last_hidden_state - expected).abs().mean() / size) for m in (lowered, rounded)]
    assert errors[0] < 0.03
    assert errors[1] > 1.5 * errors[0]


@each_decoder
def test_attention_is_seen_in_bfloat16_as_in_float32(kind: str) -> None:
    seen = []
    for model in (tiny(kind), lower(tiny(kind))):
        maps = Maps()
        with watched(model):
            watch(model, IDS[0].tolist(), maps)
        seen.append([np.concatenate(parts, 1) for parts in maps.parts.values()])
    for exact, found in zip(*seen, strict=True):
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() <= 0.05
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)  # a softmax that was not rounded


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_votes_in_bfloat16_come_near_those_in_float32(kind: str) -> None:
    """The nearness of each head, between 0 and 1, and the head in which drift was planted."""
    found = []
    changes: tuple[Any, ...] = (lambda model: model, lower)
    for change in changes:
        old, new = change(decoder(kind)), change(drifted(kind))
        recorder = Recorder(mask(2), units_of(old, "head"), BETA)
        with watched(old):
            watch(old, TEXTS[2], recorder)
        maps, _ = recorder.maps()
        comparer = Comparer(maps, BETA)
        with watched(new):
            watch(new, TEXTS[2], comparer)
        maps[1, 2] = ~maps[1, 2]
        planted = Comparer(maps, BETA)
        with watched(old):
            watch(old, TEXTS[2], planted)
        assert planted.nearness().argmin() == 1 * maps.shape[1] + 2
        found.append(comparer.nearness())
    assert np.abs(found[1] - found[0]).mean() <= 0.1


@each_decoder
def test_scores_are_multiplied_in_float32(kind: str) -> None:
    """Queries and keys are bfloat16; their products, of which the softmax is taken, are not rounded again."""
    model: Any = lower(tiny(kind))
    products: list[torch.dtype] = []
    came: list[torch.dtype] = []

    class Scores(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.bmm.default:
                products.append(args[0].dtype)
            if func is torch.ops.aten._softmax.default:
                came.append(products[-1])
            return func(*args, **kwargs or {})

    with watched(model), Scores():  # type: ignore[no-untyped-call]
        watch(model, IDS[0].tolist(), Maps())
    assert came == [torch.float32] * model.config.num_hidden_layers
    assert hidden(model).dtype == torch.bfloat16
