"""Critical component identification (CCI): the units whose attention to rationales a new task has changed most.

With A (heads, T, T) a layer's attention, row s of query s, b a percentile, lo = floor(b (T - 1) / 100):
    P(v)[t] = v[t] > sorted(v)[lo],   IoU(u, v) = |u and v| / |u or v|, 1 where both are empty
A unit is a set of heads of one layer: all of them (level block), those that share keys (group), or one (head).
    old model:  a*, s* = argmax over the unit's heads a and all tokens s of IoU(P(A[a, s]), rationale); g = P(A[a*, s*])
    new model:  c = max over the unit's heads a and all tokens s of IoU(P(A'[a, s]), g)
The lower c, the larger the change. Ties: the lowest head, then the lowest token.
Source: Kanwatchara et al. 2021 (Rational LAMOL), section 3, with each block judged by its own map.
Axes: L layers, U units of a layer, H heads, S queries of a chunk, T tokens, W words of 64 tokens, d size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from cl_dist.models.architectures import architecture
from cl_dist.models.backbone import device_of

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]
Attention = NDArray[np.float32] | Tensor
"""Attention of some queries (H, S, T): an array on a CPU, where numpy searches faster; on a GPU a tensor that is not
moved. Both give equal bits: the search compares values and counts."""
ATTENTION = "cl_dist_cci"
CHUNK = 256
"""Queries whose attention is in memory at a time: never a full map of a long text, never those of two layers."""
BLOCK = 64
"""Queries whose order statistic is searched together."""


def highest(v_HST: Attention, seen: int, beta: int) -> Any:
    """Return P of some queries' rows; row k is 0 after its first `seen` + k + 1 tokens.

    At most T - 1 - lo entries of a row are chosen. The zeros after the last row of a block are the smallest entries of
    all its rows: they are left out, and the order statistic moves down by their number.

    Returns:
        Booleans of the shape and kind of v_HST: an array, or a tensor on the same device.
    """
    queries, length = v_HST.shape[1:]
    lo = beta * (length - 1) // 100
    if isinstance(v_HST, Tensor):
        return _highest_on_device(v_HST, min(seen + queries, length), lo)
    chosen = np.zeros(v_HST.shape, dtype=bool)
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        width = min(seen + stop, length)
        part = v_HST[:, start:stop, :width]
        rank = lo - (length - width)
        bound = np.partition(part, rank, axis=-1)[..., rank : rank + 1] if rank >= 0 else 0
        chosen[:, start:stop, :width] = part > bound
    return chosen


def _highest_on_device(v_HST: Tensor, width: int, lo: int) -> Tensor:
    """Return P of rows that are 0 after `width` tokens: the order statistic is the smallest of the largest entries."""
    length = v_HST.shape[-1]
    part, most = v_HST[..., :width], length - lo
    bound = part.topk(most, sorted=False).values.amin(-1, keepdim=True) if most <= width else part.new_zeros(())
    return F.pad(part > bound, (0, length - width))


def overlap(u_HST: Bits | Tensor, v_HT: Bits) -> Floats:
    """Return IoU(u[h, s], v[h]): (H, S). Only the counts leave the device of u."""
    if isinstance(u_HST, Tensor):
        v_H1T = torch.from_numpy(np.ascontiguousarray(v_HT)).to(u_HST.device)[:, None]
        both_HS, either_HS = ((u_HST & v_H1T).sum(-1).cpu().numpy(), (u_HST | v_H1T).sum(-1).cpu().numpy())
    else:
        u_HSW, v_HSW = _words(u_HST), _words(v_HT)[:, None]
        both_HS, either_HS = (np.bitwise_count(words).sum(-1) for words in (u_HSW & v_HSW, u_HSW | v_HSW))
    return np.divide(both_HS, either_HS, out=np.ones(both_HS.shape), where=either_HS > 0)


def _rows(chosen_HST: Bits | Tensor, at_H: NDArray[np.int64]) -> Bits:
    """Return one query's row of each head: (H, T)."""
    if isinstance(chosen_HST, Tensor):
        at = torch.from_numpy(at_H).to(chosen_HST.device)
        return chosen_HST[torch.arange(len(at), device=at.device), at].cpu().numpy()
    return chosen_HST[np.arange(len(at_H)), at_H]


def _words(bits: Bits) -> NDArray[np.uint64]:
    """Return bits as words of 64, the last one padded with zeros: (..., T) -> (..., W)."""
    packed = np.packbits(bits, -1)
    padded = np.zeros((*packed.shape[:-1], -(-packed.shape[-1] // 8) * 8), dtype=np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return padded.view(np.uint64)


class Watcher(Protocol):
    """Receives the attention of one text, layer by layer, in chunks of queries."""

    def see(self, layer: int, seen: int, attention_HST: Attention) -> None:
        """Receive the rows of some queries; the first attends to `seen` tokens before its own, the next to one more."""


class Recorder:
    """For the old model: records for each unit the map that matches the rationale best."""

    def __init__(self, rationale_T: Bits, units: int, beta: int) -> None:
        """Take a text's rationale, and the number of units of a layer: 1, its groups of heads, or its heads."""
        self._rationale_T, self._units, self._beta = rationale_T, units, beta
        self._best: dict[int, tuple[Floats, Bits]] = {}

    def see(self, layer: int, seen: int, attention_HST: Attention) -> None:
        """See Watcher."""
        chosen_HST = highest(attention_HST, seen, self._beta)
        heads = len(chosen_HST)
        iou_HS = overlap(chosen_HST, np.broadcast_to(self._rationale_T, (heads, len(self._rationale_T))))
        at_H = iou_HS.argmax(1)
        found_H, bits_HT = iou_HS[np.arange(heads), at_H], _rows(chosen_HST, at_H)
        if layer in self._best:
            before_H, known_HT = self._best[layer]
            better_H = found_H > before_H  # not if equal: the earlier token wins
            found_H = np.where(better_H, found_H, before_H)
            bits_HT = np.where(better_H[:, None], bits_HT, known_HT)
        self._best[layer] = found_H, bits_HT

    def maps(self) -> tuple[Bits, Floats]:
        """Return g (L, U, T) and its IoU with the rationale (L, U)."""
        bits, found = [], []
        for layer in sorted(self._best):
            iou_H, bits_HT = self._best[layer]
            iou_UG = iou_H.reshape(self._units, -1)
            chosen_U = iou_UG.argmax(1)
            bits.append(bits_HT.reshape(self._units, iou_UG.shape[1], -1)[np.arange(self._units), chosen_U])
            found.append(iou_UG.max(1))
        return np.stack(bits), np.stack(found)


class Comparer:
    """For the new model: computes how closely each unit can still reproduce the recorded map."""

    def __init__(self, maps_LUT: Bits, beta: int) -> None:
        self._maps_LUT, self._beta = maps_LUT, beta
        self._best: dict[int, Floats] = {}

    def see(self, layer: int, seen: int, attention_HST: Attention) -> None:
        """See Watcher."""
        chosen_HST = highest(attention_HST, seen, self._beta)
        per_unit = len(chosen_HST) // self._maps_LUT.shape[1]
        found_H = overlap(chosen_HST, self._maps_LUT[layer].repeat(per_unit, 0)).max(1)
        found_U = found_H.reshape(-1, per_unit).max(1)
        self._best[layer] = np.maximum(self._best[layer], found_U) if layer in self._best else found_U

    def nearness(self) -> Floats:
        """Return c: (L, U)."""
        return np.stack([self._best[layer] for layer in sorted(self._best)])


class _Text:
    """The text being read: its watcher, and the number of layers seen."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.layers = watcher, 0


_texts: list[_Text] = []


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the model's attention for a single text, and pass every row to the watcher in float32."""
    groups = query.shape[1] // key.shape[1]
    key_HTd, value_HTd = (x[0] if groups == 1 else x[0].repeat_interleave(groups, 0) for x in (key, value))
    key_HTd = key_HTd.float()  # rounded scores would create ties and change the order of the compared values
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    place_T = torch.arange(length, device=query.device)
    parts = []
    for first in range(0, length, CHUNK):
        query_HSd = query[0, :, first : first + CHUNK].float()
        score_HST = (query_HSd @ key_HTd.transpose(1, 2)).mul_(scale)
        if softcap is not None:
            score_HST = torch.tanh(score_HST / softcap) * softcap
        behind_ST = place_T[None, :] - place_T[first : first + CHUNK, None]
        hidden_ST = behind_ST > 0 if module.is_causal else torch.zeros_like(behind_ST, dtype=torch.bool)
        if sliding_window is not None:
            hidden_ST |= behind_ST.abs() >= sliding_window
        attention_HST = score_HST.masked_fill_(hidden_ST, float("-inf")).softmax(-1)
        _pass_to_watchers(module, first if module.is_causal else length, attention_HST)
        parts.append(attention_HST.to(value.dtype) @ value_HTd)
    for text in _texts:
        text.layers += 1
    return torch.cat(parts, 1).transpose(0, 1)[None], None


def _pass_to_watchers(module: nn.Module, seen: int, attention_HST: Tensor) -> None:
    if module.training:
        raise RuntimeError("attention can be watched in evaluation mode only: dropout would be part of the maps")
    attention_HST = attention_HST.float()
    for text in _texts:
        is_host = attention_HST.device.type == "cpu"
        text.watcher.see(text.layers, seen, attention_HST.numpy() if is_host else attention_HST)


AttentionInterface.register(ATTENTION, _attention)


def _request_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args[:2], {**kwargs, "output_attentions": True}


def _attention_hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
    _pass_to_watchers(module, output[1].shape[-1], output[1][0])
    for text in _texts:
        text.layers += 1
    return output[0], None


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[None]:
    """Replace a model's attention by this module's. DeBERTa's cannot be replaced; hooks read its maps instead."""
    before = model.config._attn_implementation
    own = [module for module in model.modules() if isinstance(module, DisentangledSelfAttention)]
    hooks = [module.register_forward_pre_hook(_request_attention, with_kwargs=True) for module in own]
    hooks += [module.register_forward_hook(_attention_hook) for module in own]
    if not own:
        model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if not own:
            model.set_attn_implementation(before)


@torch.no_grad()
def watch(model: PreTrainedModel, tokens: list[int], watcher: Watcher) -> None:
    """Pass all the attention of a text to a watcher, inside `watched`. The language modelling head is not computed."""
    device = device_of(model)
    cache = {"use_cache": False} if architecture(model).is_causal else {}
    text = _Text(watcher)
    _texts.append(text)
    try:
        model.base_model(torch.tensor([tokens], device=device), **cache)
    finally:
        _texts.clear()
    assert text.layers == model.config.num_hidden_layers  # each layer attends once, in order
