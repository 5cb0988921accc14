"""Slices of attention weights that belong to a head, a group of heads or a block, from the table in architectures.py.

Axes: H query heads, G groups of heads that share keys and values, d size of a head.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cl_dist.models.architectures import Attention, architecture, layers_of
from cl_dist.partition import full_shape

Level = Literal["block", "group", "head"]


def shape_of(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Return (layers, H, G, d)."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads, size


def units_of(model: PreTrainedModel, level: Level) -> int:
    """Return the number of units in a layer.

    Raises:
        ConfigError: If the architecture is not supported.
    """
    architecture(model)
    _, heads, groups, _ = shape_of(model)
    return {"block": 1, "group": groups, "head": heads}[level]


def block_parameters(model: PreTrainedModel, layer: int) -> list[str]:
    """Return the names of a layer's parameters. The prefix ends in a dot, so layer 1 does not match layer 10."""
    prefix = f"{layers_of(model)[layer][0]}."
    return [name for name, _ in model.named_parameters() if name.startswith(prefix)]


def trainable_masks(
    model: PreTrainedModel, units: list[tuple[int, int]], level: Level, output: bool
) -> dict[str, tuple[str, Tensor]]:
    """Return the masks of trainable entries when units are frozen: name -> (axis, 1 where an entry may change).

    axis is "row" or "column" of a weight, "row" of a bias. Freezing a head freezes its queries; keys and values are
    frozen only with a whole group, since a single head does not own them. With output, the slice of the output
    projection that reads a frozen head is frozen too.

    Query and key norms with weights shared by all heads are frozen as soon as one head is. OLMo 2 normalises over all
    heads together: its frozen queries keep their direction, but not their length.
    """
    attention = architecture(model).attention
    _, heads, groups, size = shape_of(model)
    found: dict[str, tuple[str, Tensor]] = {}
    layers = layers_of(model)
    for number in sorted({layer for layer, _ in units}):
        path, layer = layers[number]
        query_H, shared_G = _owned_heads([unit for at, unit in units if at == number], level, heads, groups)
        query, shared = query_H.repeat_interleave(size), shared_G.repeat_interleave(size)
        for name, keep in _projection_masks(attention, query, shared, shared, size):
            module = _below_updates(layer.get_submodule(name))
            found[f"{path}.{name}.weight"] = ("column" if isinstance(module, Conv1D) else "row", keep)
            if getattr(module, "bias", None) is not None:
                found[f"{path}.{name}.bias"] = ("row", keep)
        for name, keep in zip(attention.norms, (query, shared), strict=False):
            for inner, parameter in _parameters_at(layer, name):
                known = full_shape(parameter).numel()
                shared_by_all = torch.ones(size) * keep.min()
                found[f"{path}.{name}.{inner}"] = ("row", keep if known == len(keep) else shared_by_all)
        if output:
            module = _below_updates(layer.get_submodule(attention.output))
            behind = "row" if isinstance(module, Conv1D) else "column"
            found[f"{path}.{attention.output}.weight"] = (behind, query)
    return found


def _below_updates(module: nn.Module) -> nn.Module:
    """Return the base layer of a low-rank update, or the layer itself. Avoids importing peft, which takes seconds."""
    below = getattr(module, "get_base_layer", None)
    return module if below is None else below()


def _owned_heads(mine: list[int], level: Level, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return masks of the heads (H,) and of the groups (G,) that are 0 for the frozen units."""
    query_H, shared_G = torch.ones(heads), torch.ones(groups)
    if level == "group":
        shared_G[mine] = 0
        query_H = shared_G.repeat_interleave(heads // groups)
    else:
        query_H[mine] = 0
        if heads == groups:
            shared_G = query_H
    return query_H, shared_G


def _projection_masks(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, size: int
) -> list[tuple[str, Tensor]]:
    """Return each projection with its mask: those of queries (H d), keys and values (G d), in the order of outputs."""
    parts = (query, key, value)
    if attention.layout == "separate":
        return list(zip(attention.projections, parts, strict=True))
    if attention.layout == "joined":
        return [(attention.projections[0], torch.cat(parts))]
    by_head = torch.stack([part.unflatten(0, (-1, size)) for part in parts], 1)
    return [(attention.projections[0], by_head.flatten())]


def _parameters_at(layer: nn.Module, path: str) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a module, or nothing if the configuration has no such module."""
    parent, _, name = path.rpartition(".")
    module = getattr(layer.get_submodule(parent), name, None)
    return [] if module is None else list(module.named_parameters())


def no_effect_biases(model: PreTrainedModel) -> dict[str, Tensor | None]:
    """Return the key biases without effect: name -> 1 where an entry has an effect, else 0; None if no entry has one.

    A bias on keys that are not rotated by their position shifts all scores of a query alike, and the softmax cancels
    it. Its gradient is rounding noise, which AdamW would turn into full steps that differ with the number of workers.
    """
    row = architecture(model)
    if row.attention.positions == "relative":
        return {}
    _, heads, groups, size = shape_of(model)
    rotary = _rotary_dims(model, size) if row.attention.positions == "rotary" else 0
    if rotary >= size:
        return {}
    counts = torch.cat([torch.ones(rotary), torch.zeros(size - rotary)]).repeat(groups)
    query, value = torch.ones(heads * size), torch.ones(groups * size)
    is_separate = row.attention.layout == "separate"
    name, keep = _projection_masks(row.attention, query, counts, value, size)[1 if is_separate else 0]
    found: dict[str, Tensor | None] = {}
    for path, layer in layers_of(model):
        if any(_parameters_at(layer, norm) for norm in row.attention.norms):
            continue
        if getattr(layer.get_submodule(name), "bias", None) is not None:
            found[f"{path}.{name}.bias"] = None if is_separate and rotary == 0 else keep
    return found


def _rotary_dims(model: PreTrainedModel, size: int) -> int:
    """Return the number of leading dimensions of a head that rotary positions rotate."""
    known: Any = getattr(model.config, "rope_parameters", None) or {}
    return int(size * known.get("partial_rotary_factor", 1.0))
