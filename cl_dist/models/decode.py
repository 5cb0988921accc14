"""Continuous-batching generation with a causal language model: every row of a batch has its own position.

`generate` of transformers ends a batch when its longest row ends. Here a finished row is replaced by the next one at
once: the old keys stay in the cache, but the mask hides them from the new row.
Axes: B rows, L tokens, V tokens of the vocabulary, T cache length, k candidates.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from cl_dist.models.attention_slices import shape_of
from cl_dist.models.backbone import device_of
from cl_dist.models.noise import uniform
from cl_dist.models.vocabulary import logits

SPAN = 16
"""Cache lengths are rounded up to a multiple of this, which limits the number of shapes."""


class CachePositions:
    """The position of each row; shared by the cache layers, which may be on several devices."""

    def __init__(self, at_B: Tensor) -> None:
        self.span = 0
        self.move_to(at_B)

    def move_to(self, at_B: Tensor) -> None:
        """Set the position of each row."""
        self.at_B = at_B
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (indices, positions) of all rows on a device: (B,) each."""
        if device not in self._on:
            self._on[device] = torch.arange(len(self.at_B), device=device), self.at_B.to(device)
        return self._on[device]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # by the library
    """Keys and values of one layer: (B, heads, capacity, size)."""

    def __init__(self, positions: CachePositions, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._positions, self._capacity = positions, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self._capacity, size)
        self.values = value_states.new_zeros(batch, heads, self._capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        length, positions = key_states.shape[2], self._positions
        if length > 1:  # the first tokens of all rows
            self.keys[:, :, :length], self.values[:, :, :length] = key_states, value_states
            return key_states, value_states
        row_B, at_B = positions.on(self.keys.device)
        self.keys[row_B, :, at_B] = key_states[:, :, 0]
        self.values[row_B, :, at_B] = value_states[:, :, 0]
        return self.keys[:, :, : positions.span], self.values[:, :, : positions.span]

    def keep(self, rows_B: Tensor) -> None:
        """Keep only these rows."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            rows_B = rows_B.to(self.keys.device)
            self.keys, self.values = self.keys[rows_B], self.values[rows_B]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._capacity


class DecodeBatch:
    """A batch of rows being generated, each with at most `capacity` tokens."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self._model: Any = model  # the library's methods are untyped
        self._device = device_of(model)
        self._capacity = -(-capacity // SPAN) * SPAN
        self._positions = CachePositions(torch.zeros(rows, dtype=torch.int64, device=self._device))
        layers = model.config.get_text_config().num_hidden_layers
        self._layers = [_Layer(self._positions, self._capacity) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))

    @torch.no_grad()
    def start(self, prompts: list[list[int]], pad: int) -> Tensor:
        """Prefill all prompts and return the logits of the last token of each: (B, V) float32."""
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        longest = int(length_B.max())
        ids_BL = torch.tensor([p + [pad] * (longest - len(p)) for p in prompts], device=self._device)
        if longest == 1:
            return self.step(ids_BL[:, 0], torch.zeros_like(length_B))
        hidden_BLH = self._model.base_model(ids_BL, past_key_values=self._cache, use_cache=True).last_hidden_state
        device = hidden_BLH.device
        last_BH = hidden_BLH[torch.arange(len(prompts), device=device), length_B.to(device) - 1]
        return logits(self._model, last_BH)

    @torch.no_grad()
    def step(self, token_B: Tensor, at_B: Tensor) -> Tensor:
        """Append a token at position at_B of each row (0 is its start) and return its logits: (B, V) float32."""
        positions = self._positions
        positions.move_to(at_B.to(self._device))
        positions.span = min(self._capacity, -(-(int(at_B.max()) + 1) // SPAN) * SPAN)
        back_BT = positions.at_B[:, None] - torch.arange(positions.span, device=self._device)[None, :]
        output = self._model.base_model(
            token_B.to(self._device)[:, None],
            position_ids=positions.at_B[:, None],
            attention_mask=self._mask(back_BT),
            past_key_values=self._cache,
            use_cache=True,
        )
        return logits(self._model, output.last_hidden_state[:, 0])

    def _mask(self, back_BT: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the attention mask of each row, from the distances to earlier tokens: (B, 1, 1, T).

        Models with sliding windows in some layers take a mask per kind of layer.
        """
        config = self._model.config
        window = getattr(config, "sliding_window", None)
        seen = self._to_model_mask(back_BT >= 0)
        if window is None:
            return seen
        near = self._to_model_mask((back_BT >= 0) & (back_BT < window))
        has_kinds = getattr(config, "layer_types", None) is not None
        return {"full_attention": seen, "sliding_attention": near} if has_kinds else near

    def _to_model_mask(self, seen_BT: Tensor) -> Tensor:
        """Convert a mask for the model's attention; eager attention adds it to the scores."""
        if self._model.config._attn_implementation != "eager":
            return seen_BT[:, None, None, :]
        added_BT = torch.zeros(seen_BT.shape, dtype=self._model.dtype, device=seen_BT.device)
        return added_BT.masked_fill_(~seen_BT, torch.finfo(self._model.dtype).min)[:, None, None, :]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        rows_B = torch.tensor(rows, device=self._device)
        for layer in self._layers:
            layer.keep(rows_B)
        self._positions.move_to(self._positions.at_B[rows_B])


class Generation:
    """A sequence being generated. Its first token is input only, not part of the output."""

    def __init__(self, first: int, key: int) -> None:
        self.last, self.key = first, key
        self.tokens: list[int] = []

    def accept(self, token: int) -> bool:
        """Append the next token and return whether the sequence ends here."""
        self.tokens.append(token)
        self.last = token
        return False


L = TypeVar("L", bound=Generation)
Pick = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (B, V), keys (B,), positions (B,)) -> tokens (B,)."""


def generate(model: PreTrainedModel, waiting: deque[L], rows: int, capacity: int, pick: Pick) -> Iterator[L]:
    """Run the waiting generations, `rows` at a time, and yield each when it ends; its slot goes to the next.

    Generations may be added to `waiting` while this runs. The composition of the batches depends only on the generated
    tokens, so the same model generates the same bits on any worker.
    """
    active = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
    is_open = [True] * len(active)  # slots without a successor stay in the batch, and are ignored
    batch = DecodeBatch(model, len(active), capacity)
    while any(is_open):
        at_B = torch.tensor([len(line.tokens) for line in active])
        logits_BV = batch.step(torch.tensor([line.last for line in active]), at_B)
        key_B = torch.tensor([line.key for line in active]).to(logits_BV.device)
        tokens = pick(logits_BV, key_B, at_B.to(logits_BV.device)).tolist()
        for slot, token in enumerate(tokens):
            if is_open[slot] and active[slot].accept(token):
                yield active[slot]
                is_open[slot] = bool(waiting)
                if waiting:
                    active[slot] = waiting.popleft()
        open_slots = [slot for slot, is_active in enumerate(is_open) if is_active]
        if open_slots and len(open_slots) <= len(active) // 2:  # halving keeps the number of shapes small
            batch.keep(open_slots)
            active, is_open = [active[slot] for slot in open_slots], [True] * len(open_slots)


def rows_within(model: PreTrainedModel, rows: int, capacity: int, kv_cache_gb: float) -> int:
    """Return the number of rows, from 1 to `rows`, whose keys and values of `capacity` tokens fit in kv_cache_gb GB."""
    layers, _, groups, size = shape_of(model)
    per_row = 2 * layers * groups * size * -(-capacity // SPAN) * SPAN * model.dtype.itemsize
    return max(1, min(rows, int(kv_cache_gb * 1e9) // per_row))


def sample_token(
    logits_BV: Tensor, key_B: Tensor, step_B: Tensor, top_k: int, top_p: float, temperature: float
) -> Tensor:
    """Sample a token for each row: (B,). A row's sample depends only on its logits, its key and its step.

    Inverse transform sampling over the candidates in falling order of probability.
    """
    count = min(top_k, logits_BV.shape[-1]) if top_k else logits_BV.shape[-1]
    best_Bk, token_Bk = torch.topk(logits_BV / temperature, count)
    share_Bk = best_Bk.softmax(-1)
    if top_p < 1:
        before_Bk = share_Bk.cumsum(-1) - share_Bk
        share_Bk = share_Bk.masked_fill(before_Bk >= top_p, 0.0)  # the most likely one always stays
    sum_Bk = share_Bk.double().cumsum(-1)
    mark_B1 = uniform(key_B, step_B)[:, None] * sum_Bk[:, -1:]
    chosen_B1 = (sum_Bk <= mark_B1).sum(-1, keepdim=True).clamp(max=count - 1)
    return token_Bk.gather(-1, chosen_B1)[:, 0]


def greedy_decode(
    model: PreTrainedModel, prompts: list[list[int]], pad: int, eos: int, max_answer: int
) -> list[list[int]]:
    """Return the greedy continuation of each prompt without its end token; at most max_answer tokens."""
    batch = DecodeBatch(model, len(prompts), max(len(prompt) for prompt in prompts) + max_answer)
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    at_B = torch.tensor([len(prompt) for prompt in prompts])
    logits_BV = batch.start(prompts, pad)
    for _ in range(max_answer):
        tokens = logits_BV.argmax(-1).cpu()
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if token != eos:
                found[row].append(token)
        alive = [slot for slot, token in enumerate(tokens.tolist()) if token != eos]
        if not alive or len(found[rows[alive[0]]]) == max_answer:
            break
        if len(alive) < len(rows):
            batch.keep(alive)
            rows, tokens, at_B = [rows[slot] for slot in alive], tokens[alive], at_B[alive]
        logits_BV = batch.step(tokens, at_B)
        at_B = at_B + 1
    return found
