"""What a head owns, for every architecture: slices of projections, checked at what attention is really computed of."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from cl_dist.learners.frozen_units import masks
from cl_dist.models.architectures import architecture, layers_of
from cl_dist.models.attention_slices import Level, block_parameters, shape_of, trainable_masks
from cl_dist.parallel.engine import Optimizing, TorchEngine, _FrozenEntries, attach
from cl_dist.parallel.world import World
from tests.architectures import IDS, KINDS, hidden, tiny

each = pytest.mark.parametrize("kind", KINDS)


class Spy:
    """Attention as the model computes it, with what it computes of; heads can be left out."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.without: dict[int, list[int]] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        self.seen.append((query.detach(), key.detach(), value.detach()))
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        output, maps = eager(module, query, key, value, mask, **kwargs)
        output[:, :, self.without.get(len(self.seen) - 1, [])] = 0
        return output, maps


@contextmanager
def spied(model: Any) -> Iterator[Spy]:
    """DeBERTa's attention cannot be replaced: its projections and its output are watched."""
    spy, hooks = Spy(), []
    row, (_, heads, _, size) = architecture(model), shape_of(model)
    if model.config.model_type == "deberta-v2":
        for number, (_, layer) in enumerate(layers_of(model)):
            parts: list[Tensor] = []
            for name in row.attention.projections:
                module = layer.get_submodule(name)
                hooks.append(module.register_forward_hook(lambda m, a, out, parts=parts: parts.append(out.detach())))

            def drop(module: Any, args: Any, output: Any, number: int = number, parts: list[Tensor] = parts) -> Any:
                whole = [part for part in parts if part.shape[1] == args[0].shape[1]]  # not those of relative places
                query, key, value = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in whole[:3])
                spy.seen.append((query, key, value))
                parts.clear()
                context = output[0].unflatten(-1, (heads, size)).clone()
                context[:, :, spy.without.get(number, [])] = 0
                return context.flatten(-2), output[1]

            hooks.append(layer.get_submodule("attention.self").register_forward_hook(drop))
    else:
        AttentionInterface.register("spy", spy.attend)
        AttentionMaskInterface.register("spy", eager_mask)
        model.set_attn_implementation("spy")
    yield spy
    for hook in hooks:
        hook.remove()
    if not hooks:
        model.set_attn_implementation("eager")


@each
@torch.no_grad()
def test_zeroing_a_heads_slice_of_the_output_projection_removes_the_head(kind: str) -> None:
    model = tiny(kind)
    model.set_attn_implementation("eager") if kind != "deberta-v2" else None
    plain = hidden(model)
    with spied(model) as spy:
        torch.testing.assert_close(hidden(model), plain, rtol=0, atol=1e-5)
        spy.seen.clear()
        spy.without = {1: [2]}
        expected = hidden(model)
    parts = trainable_masks(model, [(1, 2)], "head", output=True)
    path = f"{layers_of(model)[1][0]}.{architecture(model).attention.output}.weight"
    _zero(model, {path: parts[path]})
    torch.testing.assert_close(hidden(model), expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


@each
@pytest.mark.parametrize("level", ["head", "group"])
@torch.no_grad()
def test_the_slices_of_a_unit_are_its_queries_keys_and_values(kind: str, level: Level) -> None:
    """Noise in the entries that `kept` holds reaches these heads' queries, keys and values, and no others."""
    model = tiny(kind)
    _, heads, groups, size = shape_of(model)
    inputs = replay(model)
    with spied(model) as spy:
        inputs()
        before = spy.seen[1]
        spy.seen.clear()
        for name, (axis, keep) in trainable_masks(model, [(1, 1)], level, output=False).items():
            if "norm" in name and len(keep) == size:  # shared by all heads, tried below
                continue
            parameter = model.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter.add_(noise * ((1 - keep)[:, None] if axis == "row" and parameter.dim() == 2 else 1 - keep))
        inputs()
        after = spy.seen[1]
    mine = [1] if level == "head" or heads == groups else [2, 3]
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        of_all_heads = kind == "olmo2" and place < 2  # its norm divides by the size of all heads together
        changed = [
            h
            for h in range(old.shape[1])
            if not torch.equal(direction(old[:, h], of_all_heads), direction(new[:, h], of_all_heads))
        ]
        owned = mine if place == 0 else [1] if level == "group" or heads == groups else []
        if of_all_heads:
            changed = [
                h for h in changed if (direction(old[:, h], True) - direction(new[:, h], True)).abs().max() > 1e-4
            ]
        assert changed == owned


def direction(x: Tensor, is_wanted: bool) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) if is_wanted else x


def replay(model: Any) -> Callable[[], None]:
    """Return a function that runs a model, each projection being given what it is given now."""
    modules = [
        layer.get_submodule(n) for _, layer in layers_of(model) for n in architecture(model).attention.projections
    ]
    came: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    hooks = [m.register_forward_pre_hook(lambda m, args: came[m].append(args[0].detach().clone())) for m in modules]
    with torch.no_grad():
        hidden(model)
    for hook in hooks:
        hook.remove()

    def again() -> None:
        places = {module: iter(inputs) for module, inputs in came.items()}
        hooks = [m.register_forward_pre_hook(lambda m, args: (next(places[m]),)) for m in modules]
        with torch.no_grad():
            hidden(model)
        for hook in hooks:
            hook.remove()

    return again


@each
@pytest.mark.parametrize("level", ["block", "head", "group"])
def test_a_frozen_unit_keeps_every_bit_through_decay_and_clipping(kind: str, level: Level) -> None:
    model = tiny(kind, **({"qk_layernorm": True} if kind == "phi" else {}))
    _, heads, groups, _ = shape_of(model)
    unit = (1, 0 if level == "block" else 1)
    inputs = replay(model)
    with spied(model) as spy:
        inputs()
        before = spy.seen[1]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales = masks(trainable_masks(model, [unit], level, output=True)) if level != "block" else {}
    if level == "block":
        for name in block_parameters(model, 1):
            model.get_parameter(name).requires_grad_(False)
    train(model, scales)
    with spied(model) as spy:
        inputs()
        after = spy.seen[1]
    mine = {"block": list(range(heads)), "head": [1], "group": [1] if heads == groups else [2, 3]}[level]
    shared = list(range(groups)) if level == "block" else [1] if level == "group" or heads == groups else []
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        for head in range(old.shape[1]):
            is_frozen = head in (mine if place == 0 else shared)
            if kind == "olmo2" and place < 2 and is_frozen and level != "block":
                old_d, new_d = direction(old[:, head], True), direction(new[:, head], True)
                torch.testing.assert_close(new_d, old_d, rtol=0, atol=1e-4)
            else:
                assert torch.equal(old[:, head], new[:, head]) == is_frozen
    for name, scale in scales.items():
        stays = scale.factor(start[name]) == 0
        assert torch.equal(model.get_parameter(name)[stays], start[name][stays])
    if level == "block":
        assert all(torch.equal(model.get_parameter(n), start[n]) for n in block_parameters(model, 1))


def train(model: PreTrainedModel, scales: dict[str, Any]) -> None:
    attach(model, scales)
    optimizing = Optimizing(0.02, {}, frozenset(), weight_decay=0.1, clip=0.5, total_steps=4, warmup_steps=0)
    engine = TorchEngine(model, optimizing, 1, World(0, 1, torch.device("cpu")), {})
    engine.optimizer.restore_frozen = _FrozenEntries(model, scales, 0).put_back
    target = torch.randn(IDS.shape[1], model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    for _ in range(4):
        engine.backward((engine(IDS).last_hidden_state[0] * target).sum(), torch.zeros(()))
        engine.step()


def _zero(model: PreTrainedModel, parts: dict[str, tuple[str, Tensor]]) -> None:
    for name, (axis, keep) in parts.items():
        parameter = model.get_parameter(name)
        parameter.mul_(keep[:, None] if axis == "row" and parameter.dim() == 2 else keep)
