"""What a head owns, by architecture: which columns or rows of which projections.

Axes: H query heads, G groups of heads that share keys and values, d size of a head.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cl_dist.models.backbone import row_for

Level = Literal["block", "group", "head"]


@dataclass(frozen=True, slots=True)
class DecoderPlaces:
    """Where the attention of a decoder's layers is."""

    layers: str
    """Module path of the list of layers."""
    fused: str | None = None
    """A Conv1D for queries, keys and values: weight (in, 3 H d), their outputs one behind the other."""
    separate: tuple[str, str, str] | None = None
    """Linear layers for queries (H d, in), keys and values (G d, in)."""
    output: str = ""
    """The projection behind the heads."""


PLACES: dict[str, DecoderPlaces] = {
    "gpt2": DecoderPlaces(layers="transformer.h", fused="attn.c_attn", output="attn.c_proj"),
    "llama": DecoderPlaces(
        layers="model.layers",
        separate=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
    ),
}
"""One row per `model_type` of transformers: to support an architecture, add its row here."""


def places(model: PreTrainedModel) -> DecoderPlaces:
    """Return the row of PLACES for a model.

    Raises:
        ConfigError: If the architecture has no row.
    """
    return row_for(model, PLACES, "cl_dist/models/heads.py")


def shape_of(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Return (layers, H, G, d)."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads, size


def units_of(model: PreTrainedModel, level: Level) -> int:
    """Return how many units a layer has.

    Raises:
        ConfigError: If the architecture has no row in PLACES.
    """
    places(model)
    _, heads, groups, _ = shape_of(model)
    return {"block": 1, "group": groups, "head": heads}[level]


def block_parameters(model: PreTrainedModel, layer: int) -> list[str]:
    """Return the names of a layer's parameters. By whole names: layer 1 is no part of layer 10."""
    prefix = f"{places(model).layers}.{layer}."
    return [name for name, _ in model.named_parameters() if name.startswith(prefix)]


def kept(
    model: PreTrainedModel, units: list[tuple[int, int]], level: Level, output: bool
) -> dict[str, tuple[str, Tensor]]:
    """Return what remains trainable when units are frozen: name -> (axis, 1 where an entry may move).

    axis is "row" or "column" of a weight, "row" of a bias. A frozen head keeps its queries; keys and values are frozen
    with a whole group only, since a head alone does not own them. With output, the part of the projection behind the
    heads that reads a frozen head is frozen too.
    """
    where = places(model)
    _, heads, groups, size = shape_of(model)
    per_group = heads // groups
    named = {name for name, _ in model.named_parameters()}
    found: dict[str, tuple[str, Tensor]] = {}
    for layer in sorted({layer for layer, _ in units}):
        mine = [unit for at, unit in units if at == layer]
        query_H, shared_G = torch.ones(heads), torch.ones(groups)
        if level == "group":
            shared_G[mine] = 0
            query_H = shared_G.repeat_interleave(per_group)
        else:
            query_H[mine] = 0
            if per_group == 1:
                shared_G = query_H
        query, shared = query_H.repeat_interleave(size), shared_G.repeat_interleave(size)
        prefix = f"{where.layers}.{layer}."
        if where.fused is not None:
            entries = [(where.fused, "column", torch.cat([query, shared, shared]))]
            behind = "row"
        else:
            assert where.separate is not None
            entries = [(name, "row", keep) for name, keep in zip(where.separate, (query, shared, shared), strict=True)]
            behind = "column"
        for name, axis, keep in entries:
            found[f"{prefix}{name}.weight"] = (axis, keep)
            if f"{prefix}{name}.bias" in named:
                found[f"{prefix}{name}.bias"] = ("row", keep)
        if output:
            found[f"{prefix}{where.output}.weight"] = (behind, query)
    return found
