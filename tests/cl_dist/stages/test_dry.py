"""What a model would hold, told without its weights, is what it holds."""

import math
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.language import SpecialTokens
from cl_dist.learners.base import Progress
from cl_dist.methods import METHODS
from cl_dist.methods.base import MethodConfig
from cl_dist.methods.rational_lamol import RationalLamolConfig
from cl_dist.models.backbone import load_backbone
from cl_dist.models.causal import CausalModel
from cl_dist.models.config import ModelConfig
from cl_dist.planning.live import LiveTensorBytes, tensors_of
from cl_dist.planning.trace import TracedLearner
from cl_dist.stages.build import new_learner

Sizes = dict[str, Any]
LENGTH, ROWS = 16, 4
HEADS = 4


def bert(layers: int, hidden: int, inner: int, heads: int) -> Sizes:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    more = {"intermediate_size": inner, "vocab_size": 40, "max_position_embeddings": 64}
    return {"model_type": "bert"} | sizes | more


def gpt2(layers: int, hidden: int, inner: int, heads: int) -> Sizes:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": inner, "n_positions": 64}
    return {"model_type": "gpt2", "vocab_size": 40, "bos_token_id": None, "eos_token_id": None} | sizes


def llama(layers: int, hidden: int, inner: int, heads: int) -> Sizes:
    return bert(layers, hidden, inner, heads) | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}


def config(name: str, **over: Any) -> MethodConfig:
    return METHODS[name].config.model_validate(dict(tiny.METHODS[name]) | over)


def model(sizes: Sizes, **over: Any) -> ModelConfig:
    return ModelConfig(source="nowhere", config=sizes, **over)


@pytest.mark.parametrize(
    ("sizes", "output", "elements"),
    [
        (bert, None, lambda h, d, f, a: 4 * h + 4 * d + 2 * f + a + 4 + LENGTH),
        (gpt2, "lm", lambda h, d, f, a: 4 * h + 4 * d + 5 * f + a + 4 + LENGTH),
        (llama, "lm", lambda h, d, f, a: 6 * h + 4 * d + 4 * f + a + 2 + LENGTH),
    ],
)
@pytest.mark.parametrize(("hidden", "inner", "heads"), [(32, 48, 4), (64, 48, 4), (32, 96, 4), (32, 48, 8)])
def test_a_layer_keeps_what_a_sum_by_hand_says(
    sizes: Callable[..., Sizes], output: Any, elements: Callable[..., int], hidden: int, inner: int, heads: int
) -> None:
    kept = [
        TracedLearner(config("sequential"), model(sizes(n, hidden, inner, heads), output=output), (2,))
        .micro(ROWS, LENGTH, 2)
        .saved["activations"]
        for n in (2, 3)
    ]
    size = 8 if sizes is llama else hidden // heads
    assert kept[1] - kept[0] == 4 * ROWS * LENGTH * elements(hidden, heads * size, inner, heads)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_trained_is_what_the_method_trains(name: str) -> None:
    sizes = gpt2(2, 32, 48, 2) if tiny.writes(name) else bert(2, 32, 48, 2)
    traced = TracedLearner(config(name), model(sizes), (2, 3, 2))
    learner = new_learner(config(name), model(sizes), (2, 3, 2), 0)
    backbone: Any = load_backbone(model(sizes), causal=tiny.writes(name))
    own = {id(parameter) for parameter in backbone.parameters()}
    learner.model = CausalModel(backbone) if tiny.writes(name) else learner.build(backbone, 2)
    learner.start_task(2, (2,))
    for count, is_own in ((traced.backbone, True), (traced.parts, False)):
        there = [p for p in learner.model.parameters() if (id(p) in own) == is_own]
        assert count.elements == sum(p.numel() for p in there)
        assert count.trained == sum(p.numel() for p in there if p.requires_grad)


@pytest.mark.parametrize("name", ["sequential", "ctr", "hat", "adapter", "lora", "lamol"])
def test_a_micro_batch_without_data_makes_as_much_as_one_with_data(name: str) -> None:
    sizes = gpt2(2, 32, 48, 2) if tiny.writes(name) else bert(2, 32, 48, 2)
    traced = TracedLearner(config(name), model(sizes), (2,))
    learner = new_learner(config(name), model(sizes), (2,), 0)
    backbone: Any = load_backbone(model(sizes), causal=tiny.writes(name))
    learner.model = CausalModel(backbone) if tiny.writes(name) else learner.build(backbone, 0)
    learner.start_task(0, (0,))
    batch = traced._batch(ROWS, LENGTH, 2)
    batch = {key: torch.ones(value.shape, dtype=value.dtype) * (key != "task") for key, value in batch.items()}
    batch |= {key: value - 1 for key, value in batch.items() if key in ("label", "owner", "part", "place")}
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0  # with rows all equally long the library leaves the mask out
    live = LiveTensorBytes()
    live.show(tensors_of(learner.model), "")
    before = live.live
    live.show(batch.values(), "")
    live.restart()
    with live:
        loss = learner.loss(learner.model.train(), batch, Progress(0, 10, 0, 10))
        (
            torch.stack([term.sum() for term in (*loss.per_example.values(), *loss.regularizers.values())]).sum()
        ).backward()
    micro = traced.micro(ROWS, LENGTH, 2)
    told = max(sum(point.activations.values()) + 4 * point.gradients for point in micro.points)
    assert told == pytest.approx(live.peak - before, rel=0.03)


def test_a_frozen_backbone_keeps_less_and_plugins_are_told_apart() -> None:
    tuned, frozen, head = (
        TracedLearner(config(name, **over), model(bert(2, 32, 48, 2)), (2,)).micro(ROWS, LENGTH, 2).saved
        for name, over in (("sequential", {}), ("hat", {}), ("sequential", {"tune": "head"}))
    )
    assert frozen["activations"] < tuned["activations"]
    assert frozen["plugins"] > 0
    assert "plugins" not in tuned
    assert head["activations"] < tuned["activations"] / 10


@pytest.mark.parametrize(("name", "sizes"), [("sequential", bert(6, 32, 48, 2)), ("lamol", gpt2(6, 32, 48, 2))])
def test_computed_again_activations_hardly_grow_with_the_layers(name: str, sizes: Any) -> None:
    kept, again = (
        TracedLearner(config(name), model(sizes), (2,), recompute=recompute).micro(ROWS, LENGTH, 2).saved["activations"]
        for recompute in (False, True)
    )
    assert again < kept / 2.5


def test_capsules_grow_with_the_tasks_and_masks_too() -> None:
    one, three = (TracedLearner(config("ctr"), model(bert(2, 32, 48, 2)), (2,) * count) for count in (1, 3))
    assert three.micro(ROWS, LENGTH, 2).saved["plugins"] > 1.5 * one.micro(ROWS, LENGTH, 2).saved["plugins"]
    gated = 24 + 32
    assert three.buffers - one.buffers == 4 * 2 * gated  # 4 plugins, 2 finished tasks, a byte a unit
    assert three.ended() == 4 * 3 * gated // 8


def test_bfloat16_halves_weights_and_most_of_what_is_kept_but_no_count() -> None:
    whole, half = (
        TracedLearner(config("lamol"), model(gpt2(2, 32, 48, 2), dtype=kind), (2,)) for kind in ("float32", "bfloat16")
    )
    assert whole.backbone == half.backbone
    a, b = (traced.micro(ROWS, LENGTH, 2).saved for traced in (whole, half))
    assert b["activations"] == pytest.approx(a["activations"] / 2, rel=0.05)
    assert b["logits"] == a["logits"]  # the loss is computed in float32


def test_lamols_two_losses_have_logits_for_all_of_their_labels() -> None:
    sizes = gpt2(2, 32, 48, 2)
    both, only = (TracedLearner(config("lamol", lm_weight=w), model(sizes), (2,)) for w in (0.25, 0.0))
    assert both.labels(ROWS, LENGTH, 3) == {"qa": 3 * ROWS, "lm": LENGTH * ROWS}
    assert only.labels(ROWS, LENGTH, 3) == {"qa": 3 * ROWS}
    assert both.micro(ROWS, LENGTH, 3).saved["logits"] == 4 * 40 * (3 + LENGTH) * ROWS
    assert only.micro(ROWS, LENGTH, 3).saved["logits"] == 4 * 40 * 3 * ROWS


def test_a_teacher_is_counted_beside_the_model() -> None:
    traced = TracedLearner(config("lamol", distill=0.5), model(gpt2(2, 32, 48, 2)), (2, 2))
    assert traced.extras["teacher"] == 4 * traced.backbone.elements
    assert traced.micro(ROWS, LENGTH, 2).points


def test_seventy_billion_parameters_are_counted_and_none_is_allocated() -> None:
    sizes = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    sizes |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = TracedLearner(config("lamol"), model(sizes, dtype="bfloat16"), (2,))
    attention, feeding, norms = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672, 2 * 8192
    assert traced.backbone.elements == 80 * (attention + feeding + norms) + 2 * 128256 * 8192 + 8192
    assert traced.largest == 128256 * 8192
    assert traced.block == attention + feeding + norms
    assert traced.decoder == (80, 64, 8, 128, 128256)
    micro = traced.micro(1, 128, 2)
    assert math.isclose(micro.points[-1].gradients, traced.backbone.elements, rel_tol=0.02)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: less than a GiB


@pytest.mark.parametrize("level", ["block", "group", "head"])
@pytest.mark.parametrize("freeze", ["cci", "first"])
def test_low_rank_updates_are_what_is_trained(level: str, freeze: str) -> None:
    """Two layers of one head group each; gates of what is frozen are traced too."""
    settings = {**tiny.METHODS["rational_lamol"], "level": level, "freeze": freeze, "lora": {"r": 4}}
    method = parse(RationalLamolConfig, settings)
    traced = TracedLearner(method, model(gpt2(2, 32, 48, 2)), (2, 2), vocabulary=200)
    new = SpecialTokens(0, 0).size(2, 64)
    updates = 2 * (4 * 32 + 4 * 96)  # of the fused projection of queries, keys and values
    frozen = updates // 2 if (level, freeze) == ("block", "first") else 0
    assert traced.backbone.trained == 0
    assert traced.parts.trained == updates - frozen + new * 32
    assert traced.micro(ROWS, LENGTH, 2).points
