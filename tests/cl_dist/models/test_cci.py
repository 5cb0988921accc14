"""Critical component identification, checked against the definition written out as loops over eager attention maps."""

import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cl_dist.models import cci
from cl_dist.models.attention_slices import shape_of, trainable_masks, units_of
from cl_dist.models.cci import Comparer, Recorder, Watcher, highest, watch, watched
from cl_dist.planning.live import LiveTensorBytes
from cl_dist.stage import VoteConfig
from cl_dist.stages.vote import tally
from tests.cl_dist.models.test_decode import decoder

BETA = 80
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7, 7, 2, 9, 4], list(range(1, 24)), [11, 5]]
RATIONALES = [[4, 5], [1], [0, 9, 10, 20], [1]]
LEVELS: tuple[Literal["block", "group", "head"], ...] = ("block", "group", "head")
both = pytest.mark.parametrize("kind", ["gpt2", "llama"])
each_level = pytest.mark.parametrize("level", LEVELS)


def drifted(kind: str, amount: float = 1.0) -> PreTrainedModel:
    """Return the same model after something was learned."""
    model = decoder(kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.std().nan_to_num() * noise)
    return model


def mask(text: int) -> np.ndarray:
    found = np.zeros(len(TEXTS[text]), dtype=bool)
    found[RATIONALES[text]] = True
    return found


def ours(old: PreTrainedModel, new: PreTrainedModel, level: Any, text: int) -> tuple[Any, Any, Any]:
    recorder = Recorder(mask(text), units_of(old, level), BETA)
    with watched(old):
        watch(old, TEXTS[text], recorder)
    maps, iou = recorder.maps()
    comparer = Comparer(maps, BETA)
    with watched(new):
        watch(new, TEXTS[text], comparer)
    return maps, iou, comparer.nearness()


@torch.no_grad()
def eager_maps(model: Any, text: int) -> list[Any]:
    model.set_attn_implementation("eager")
    output = model.base_model(torch.tensor([TEXTS[text]]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    return [layer[0].float().numpy() for layer in output.attentions]


def chosen(row: Any) -> set[int]:
    threshold = np.percentile(row.astype(np.float64), BETA, method="lower")
    return {t for t, value in enumerate(row) if value > threshold}


def iou(u: set[int], v: set[int]) -> float:
    return len(u & v) / len(u | v) if u | v else 1.0


def slow(old: PreTrainedModel, new: PreTrainedModel, level: str, text: int) -> tuple[Any, Any, Any]:
    """The definition, one row of one head of one layer after the other."""
    _, heads, groups, _ = shape_of(old)
    sizes = {"block": heads, "group": heads // groups, "head": 1}
    rationale = set(RATIONALES[text])
    maps: list[list[set[int]]] = []
    fits: list[list[float]] = []
    near: list[list[float]] = []
    for before, after in zip(eager_maps(old, text), eager_maps(new, text), strict=True):
        maps.append([])
        fits.append([])
        near.append([])
        for first in range(0, heads, sizes[level]):
            best, found = -1.0, set[int]()
            for a in range(first, first + sizes[level]):
                for s in range(len(TEXTS[text])):
                    value = iou(chosen(before[a, s]), rationale)
                    if value > best:
                        best, found = value, chosen(before[a, s])
            c = -1.0
            for a in range(first, first + sizes[level]):
                for s in range(len(TEXTS[text])):
                    c = max(c, iou(chosen(after[a, s]), found))
            maps[-1].append(found)
            fits[-1].append(best)
            near[-1].append(c)
    return maps, np.array(fits), np.array(near)


@both
@each_level
@pytest.mark.parametrize("chunk", [256, 5])
def test_votes_are_those_of_the_definition(kind: str, level: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cci, "CHUNK", chunk)  # a text of 23 tokens comes in five parts
    old, new = decoder(kind), drifted(kind)
    for text in range(len(TEXTS)):
        maps, fits, near = ours(old, new, level, text)
        expected = slow(old, new, level, text)
        assert [[set(np.flatnonzero(unit)) for unit in layer] for layer in maps] == expected[0]
        np.testing.assert_array_equal(fits, expected[1])
        np.testing.assert_array_equal(near, expected[2])
        assert text != 2 or near.min() < 1  # in short texts there is little to tell apart


@both
@each_level
def test_a_model_is_as_near_to_itself_as_can_be_and_no_vote_is_decisive(kind: str, level: Any) -> None:
    model = decoder(kind)
    found = [ours(model, model, level, text)[2] for text in range(len(TEXTS))]
    assert all((c == 1).all() for c in found)
    counted = tally(found, VoteConfig(level=level, top_k=2))
    first = [[0, 0]] if level == "block" else [[0, 0], [0, 1]]
    assert counted["chosen"] == first  # ties by place
    assert counted["ties"] == len(TEXTS)
    assert counted["margin"] == 0  # all votes went to the same place, and none of them is evidence
    assert np.min(counted["mean_c"]) == 1.0


@both
def test_dropout_in_the_settings_changes_nothing(kind: str) -> None:
    model: Any = decoder(kind)
    plain = ours(model, drifted(kind), "head", 0)[2]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    np.testing.assert_array_equal(ours(model, drifted(kind), "head", 0)[2], plain)
    model.train()
    with pytest.raises(RuntimeError, match="evaluation mode"), watched(model):
        watch(model, TEXTS[0], Recorder(mask(0), 1, BETA))


@both
@pytest.mark.parametrize(("level", "unit"), [("block", (1, 0)), ("group", (0, 1)), ("head", (1, 2)), ("head", (0, 0))])
def test_drift_planted_in_one_unit_alone_wins(kind: str, level: Any, unit: tuple[int, int]) -> None:
    """The recorded maps of one unit are turned round: what the model does there now is another thing."""
    model = decoder(kind)
    votes = []
    for text in (0, 2):
        recorder = Recorder(mask(text), units_of(model, level), BETA)
        with watched(model):
            watch(model, TEXTS[text], recorder)
        maps, _ = recorder.maps()
        maps[unit] = ~maps[unit]
        comparer = Comparer(maps, BETA)
        with watched(model):
            watch(model, TEXTS[text], comparer)
        votes.append(comparer.nearness())
    counted = tally(votes, VoteConfig(level=level, top_k=1))
    assert counted["chosen"] == [list(unit)]
    assert counted["margin"] == 1.0


def plain(v: np.ndarray, beta: int) -> np.ndarray:
    """P(v) along the last axis, whatever stands behind a query."""
    lo = beta * (v.shape[-1] - 1) // 100
    return v > np.partition(v, lo, axis=-1)[..., lo : lo + 1]


@pytest.mark.parametrize("beta", [0, 50, 80, 99])
def test_the_mask_is_numpys_percentile(beta: int) -> None:
    rng = np.random.default_rng(beta)
    for T in [*range(2, 40), 127, 256, 400]:
        rows = rng.random((3, T)).astype(np.float32)
        rows[1, T // 2 :] = 0  # as behind a causal mask
        rows[2] = np.round(rows[2], 1)  # many ties
        bound = np.percentile(rows.astype(np.float64), beta, axis=-1, method="lower", keepdims=True)
        np.testing.assert_array_equal(plain(rows, beta), rows > bound)


@pytest.mark.parametrize("beta", [0, 50, 80, 99])
def test_the_causal_search_is_the_plain_one(beta: int) -> None:
    for T in (1, 2, 63, 64, 65, 150):
        scores = torch.randn(2, T, T, generator=torch.Generator().manual_seed(T))
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        maps = scores.masked_fill(hidden, float("-inf")).softmax(-1).numpy()
        np.testing.assert_array_equal(highest(maps, 0, beta), plain(maps, beta))
        np.testing.assert_array_equal(highest(maps[:, T // 2 :], T // 2, beta), plain(maps, beta)[:, T // 2 :])


@pytest.mark.parametrize("level", [1, 2, 4])
@pytest.mark.parametrize("beta", [0, 50, 80, 100])
def test_the_search_on_a_device_gives_the_bits_of_the_search_on_the_host(level: int, beta: int) -> None:
    generator = torch.Generator().manual_seed(beta)
    heads, length, chunk = 4, 70, 32

    def show(watcher: Watcher, maps: Tensor, kind: str) -> None:
        for layer in range(2):
            for first in range(0, length, chunk):
                part = maps[layer, :, first : first + chunk]
                watcher.see(layer, first, part.numpy() if kind == "host" else part)

    watchers: dict[str, tuple[Recorder, Comparer]] = {}
    target = np.zeros(length, dtype=bool)
    target[10:30] = True
    old, new = (torch.randn(2, heads, length, length, generator=generator) for _ in range(2))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    # Rounded, so that many values tie.
    old, new = (x.masked_fill(hidden, float("-inf")).softmax(-1).mul(64).round().div(64) for x in (old, new))
    for kind in ("host", "device"):
        recorder = Recorder(target, level, beta)
        show(recorder, old, kind)
        comparer = Comparer(recorder.maps()[0], beta)
        show(comparer, new, kind)
        watchers[kind] = recorder, comparer
    for host, device in zip(watchers["host"][0].maps(), watchers["device"][0].maps(), strict=True):
        np.testing.assert_array_equal(host, device)
    np.testing.assert_array_equal(watchers["host"][1].nearness(), watchers["device"][1].nearness())


def test_votes_are_counted_by_place_where_they_tie() -> None:
    c = np.array([[0.5, 0.2], [0.2, 0.9]])
    found = tally([c, c, np.array([[0.1, 0.2], [0.2, 0.9]])], VoteConfig(level="head", top_k=2))
    assert found["votes"] == [[1, 3], [2, 0]]
    assert found["chosen"] == [[0, 1], [1, 0]]
    assert found["ties"] == 1  # the third row's second vote
    assert found["margin"] == pytest.approx(2 / 3)
    assert [minimum["unit"] for minimum in found["minima"]] == [[0, 1], [0, 1], [0, 0]]
    assert np.array(found["histogram"]).sum() == 12


@both
@pytest.mark.parametrize("level", ["group", "head"])
def test_a_heads_slices_are_all_that_it_owns(kind: str, level: Any) -> None:
    """With the slices of a unit's values and outputs at zero, the model computes what it does without these heads."""
    model: Any = decoder(kind)
    _, heads, groups, size = shape_of(model)
    unit = (1, 1)
    mine = [1] if level == "head" or heads == groups else [2, 3]
    parts = trainable_masks(model, [unit], level, output=True)
    layer = model.get_submodule("transformer.h.1.attn" if kind == "gpt2" else "model.layers.1.self_attn")
    behind = layer.c_proj if kind == "gpt2" else layer.o_proj

    def without(module: Any, args: Any) -> Any:
        (x_BLX,) = args
        x_BLX = x_BLX.clone()
        for head in mine:
            x_BLX[..., head * size : (head + 1) * size] = 0
        return (x_BLX,)

    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        hook = behind.register_forward_pre_hook(without)
        expected = model(ids).logits
        hook.remove()
        plain = model(ids).logits
        for name, (axis, keep) in parts.items():
            parameter = model.get_parameter(name)
            parameter *= keep[:, None] if axis == "row" and parameter.dim() == 2 else keep
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    if kind == "llama" and level == "head":
        assert not any("k_proj" in name and (keep == 0).any() for name, (_, keep) in parts.items())


@pytest.mark.timeout(300)
def test_eight_thousand_tokens_take_a_part_of_one_layers_map() -> None:
    """Tensors and arrays together; a map of all queries of one layer would have 4 bytes for every head and pair."""
    length, layers, heads = 8192, 3, 2
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=60, max_position_embeddings=length)
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config).eval()
    rationale = np.zeros(length, dtype=bool)
    rationale[100:200] = True
    recorder, live = Recorder(rationale, heads, BETA), LiveTensorBytes()
    tracemalloc.start()
    with watched(model), live:
        watch(model, [number % 60 for number in range(length)], recorder)
    _, arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    maps, _ = recorder.maps()
    assert maps.shape == (layers, heads, length)
    assert live.peak + arrays < heads * length**2 * 4 / 4
