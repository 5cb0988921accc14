"""Low-rank updates, and rows of the vocabulary that are trained beside them, on every decoder of the table."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_dist.errors import ConfigError
from cl_dist.learners.frozen_units import masks
from cl_dist.models.architectures import ARCHITECTURES
from cl_dist.models.attention_slices import Level, trainable_masks
from cl_dist.models.config import LoraShape
from cl_dist.models.lowrank import (
    add_update,
    layers_with_updates,
    merge_updates,
    own_parameters,
    trainable_update_masks,
)
from cl_dist.models.vocabulary import add_trainable_rows, extend_vocabulary, logits
from tests.architectures import DECODERS, IDS, WORDS, tiny

KNOWN, SIZE, SEED = WORDS - 4, WORDS + 6, 5  # tables often have more rows than the tokenizer has tokens
SHAPE = LoraShape(r=4)
LONG = torch.cat([IDS.clamp(max=KNOWN - 1), torch.arange(KNOWN, SIZE)[None]], 1)
"""A text with every new token."""
each = pytest.mark.parametrize("kind", DECODERS)


def updated(kind: str, shape: LoraShape = SHAPE) -> Any:
    model: Any = tiny(kind, causal=True)
    add_trainable_rows(model, SIZE, KNOWN, SEED)
    add_update(model, shape, "it")
    return model.eval()


@torch.no_grad()
def moved(model: Any, keep: dict[str, Tensor] | None = None) -> Any:
    """Move all that is trained, but for entries that are to be kept."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(own_parameters(model)):
        parameter = model.get_parameter(name)
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.add_(noise * (keep or {}).get(name, torch.ones(())))
    return model


@torch.no_grad()
def all_logits(model: Any) -> Tensor:
    return logits(model, model.base_model(LONG).last_hidden_state)


@each
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_update_changes_nothing_and_new_rows_are_those_of_an_extended_vocabulary(kind: str, tied: bool) -> None:
    plain = tiny(kind, causal=True, tie_word_embeddings=tied)
    extend_vocabulary(plain, SIZE, KNOWN, SEED)
    model = tiny(kind, causal=True, tie_word_embeddings=tied)
    add_trainable_rows(model, SIZE, KNOWN, SEED)
    add_update(model, SHAPE, "it")
    torch.testing.assert_close(all_logits(model), all_logits(plain), rtol=1e-5, atol=1e-5)
    rows = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(".rows"))
    assert rows == (1 if tied else 2) * (SIZE - KNOWN) * model.config.hidden_size


@each
def test_a_merged_model_is_a_plain_one_that_writes_the_same(kind: str) -> None:
    model = moved(updated(kind))
    before, first = all_logits(model), all_logits(updated(kind))
    assert (before - first).abs().max() > 0.01
    merge_updates(model)
    assert own_parameters(model) == frozenset()
    assert {name for name, _ in model.named_parameters()} == {n for n, _ in tiny(kind, causal=True).named_parameters()}
    torch.testing.assert_close(all_logits(model), before, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("level", ["head", "group"])
def test_frozen_units_keep_every_bit_of_what_updates_add_to_them(kind: str, level: Level) -> None:
    attention = ARCHITECTURES[kind].attention
    names = dict.fromkeys(path.rpartition(".")[2] for path in (*attention.projections, attention.output))
    model = updated(kind, LoraShape(r=4, target_modules=tuple(names)))
    moved(model)  # as after a first task
    parts = trainable_masks(model, [(1, 1)], level, output=True)
    chosen = trainable_update_masks(model, "it", parts)
    assert chosen
    before = added(model)
    scales = masks(chosen)
    moved(model, {name: scale.factor(model.get_parameter(name)) for name, scale in scales.items()})
    after = added(model)
    frozen = 0
    for path, old in before.items():
        axis, keep = parts.get(f"{path}.weight", ("row", torch.ones(old.shape[0])))
        is_kept = (keep == 0)[:, None].expand_as(old) if axis == "row" else (keep == 0).expand_as(old)
        frozen += int(is_kept.sum())
        assert torch.equal(after[path][is_kept], old[is_kept])
        assert not torch.equal(after[path][~is_kept], old[~is_kept])
    assert frozen > 0


def added(model: Any) -> dict[str, Tensor]:
    """Return what is added to the weights below updates, by their paths."""
    layers: dict[str, Any] = dict(layers_with_updates(model))
    return {path: layer.get_delta_weight("it").detach() for path, layer in layers.items()}


def test_layers_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match=r"target_modules=\['nothing'\]"):
        updated("llama", LoraShape(target_modules=("nothing",)))
