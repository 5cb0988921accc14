"""Every row of the table of architectures, tried on a tiny model of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from cl_dist.config import parse
from cl_dist.errors import ConfigError
from cl_dist.learners.lora import Lora
from cl_dist.methods.lora import LoraConfig
from cl_dist.models import cci
from cl_dist.models.architectures import ARCHITECTURES, architecture, embedding_names, layers_of
from cl_dist.models.attention_slices import block_parameters, no_effect_biases, shape_of
from cl_dist.models.backbone import load_backbone
from cl_dist.models.config import ModelConfig, PluginShape, max_positions
from cl_dist.models.decode import greedy_decode
from cl_dist.models.plugin import CtrClassifier
from cl_dist.models.task_modules import TaskNorms
from tests.architectures import DECODERS, IDS, KINDS, MAX_LENGTH, PAD, TINY, WIDTH, hidden, tiny

each = pytest.mark.parametrize("kind", KINDS)
SHAPE = PluginShape(tsm_size=24, capsule_mid=6, filters=5, s_max=50.0)
POST_NORM = {"bert", "roberta", "distilbert", "deberta-v2"}
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}


def ctr(kind: str) -> CtrClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CtrClassifier(tiny(kind), SHAPE)
        model.add_task(2)
        for plugin in model.plugins:
            for layer in (plugin.fc1, plugin.fc2):
                nn.init.normal_(layer.weight, std=0.3)
    model.context.token_mask_BL = torch.ones_like(IDS, dtype=torch.bool)
    return model.eval()


def test_every_row_has_a_tiny_configuration() -> None:
    assert set(TINY) == set(ARCHITECTURES)
    for kind in KINDS:
        assert tiny(kind).config.model_type == kind


def test_an_unknown_architecture_is_told_which_row_to_add_and_where() -> None:
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=8, num_layers=1, num_heads=1, attention_types=[[["global"], 1]]
    )
    with pytest.raises(
        ConfigError, match=r"model_type='gpt_neo': expected one of bert, .*olmo2; .*add its row to "
    ) as e:
        CtrClassifier(AutoModel.from_config(config), SHAPE)  # type: ignore[no-untyped-call]
    assert "ARCHITECTURES in cl_dist/models/architectures.py" in str(e.value)


@each
def test_a_model_has_the_modules_that_its_row_names(kind: str) -> None:
    for model in (tiny(kind), tiny(kind, causal=True) if kind in DECODERS else tiny(kind)):
        row, names = architecture(model), {name for name, _ in model.named_parameters()}
        layers = layers_of(model)
        assert len(layers) == model.config.num_hidden_layers
        for number, (path, layer) in enumerate(layers):
            for block in row.sub_blocks:
                layer.get_submodule(block.output)
            projections = [layer.get_submodule(name) for name in row.attention.projections]
            _, heads, groups, size = shape_of(model)
            outputs = sum(p.get_parameter("weight").numel() for p in projections) // WIDTH
            assert outputs == (heads + 2 * groups) * size
            assert set(block_parameters(model, number)) == {name for name in names if name.startswith(f"{path}.")}
        inside = embedding_names(model)
        assert f"{next(n for n, p in model.named_parameters() if p is embeddings(model))}" in inside
        assert not any(name.startswith(path) for path, _ in layers for name in inside)


def embeddings(model: Any) -> Tensor:
    found: Tensor = model.get_input_embeddings().weight
    return found


# --- plugins


@each
@torch.no_grad()
def test_what_a_plugin_returns_is_added_to_the_residual_stream(kind: str) -> None:
    model = ctr(kind)
    came: list[Tensor] = []
    for plugin in model.plugins:
        plugin.register_forward_hook(lambda module, args, output: came.append(output))
    passed: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        passed.append(
            (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)
        )

    for _, layer in layers_of(model.backbone):
        layer.register_forward_hook(note, with_kwargs=True)
    hidden(model.backbone)
    assert len(came) == 2 * len(passed) == len(model.plugins)
    norms = iter(model.norms)
    for number, (x, y) in enumerate(passed):
        attention, ffn = came[2 * number : 2 * number + 2]
        expected = x + attention + ffn
        if kind in POST_NORM:
            middle = next(norms)(x + attention)
            expected = next(norms)(middle + ffn)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@each
@torch.no_grad()
def test_each_plugin_alone_changes_the_output(kind: str) -> None:
    plain = hidden(tiny(kind))
    model = ctr(kind)
    for chosen in model.plugins:
        hooks = [
            p.register_forward_hook(lambda module, args, output: module.inner(*args))
            for p in model.plugins
            if p is not chosen
        ]
        assert (hidden(model.backbone) - plain).abs().max() > 1e-3
        for hook in hooks:
            hook.remove()


@each
@torch.no_grad()
def test_zero_plugins_leave_the_backbone_as_it_is(kind: str) -> None:
    model = ctr(kind)
    for plugin in model.plugins:
        for parameter in plugin.fc2.parameters():
            parameter.zero_()
    torch.testing.assert_close(hidden(model.backbone), hidden(tiny(kind)), **EXACT)


@each
def test_a_task_owns_every_norm_with_weights_in_the_layers(kind: str) -> None:
    """Phi's two sub-blocks read one norm; OLMo's norms have no weights; ModernBERT's first layer has one norm."""
    model = ctr(kind)
    known = {"phi": 2, "olmo": 0, "modernbert": 5}.get(kind, 2 * len(layers_of(model.backbone)))
    assert len(model.norms) == known
    for norms in model.norms:
        assert isinstance(norms, TaskNorms)
        for own, base in zip(norms.norms[0].parameters(), norms.base.parameters(), strict=True):
            torch.testing.assert_close(own, base, **EXACT)
            assert own is not base


@each
def test_what_is_saved_beside_the_backbone_is_every_parameter_that_it_lacks(kind: str, tmp_path: Path) -> None:
    """Names would not tell: Llama has a `gate_proj`, Phi an `fc1`."""
    model, plain = ctr(kind), tiny(kind)
    before = {id(parameter) for parameter in plain.parameters()}
    grown = CtrClassifier(plain, SHAPE)
    grown.add_task(2)
    added = {name for name, parameter in grown.named_parameters() if id(parameter) not in before}
    assert grown.own_parameters().keys() == added
    model.save_plugins(tmp_path / "plugins.safetensors")
    grown.context.token_mask_BL = torch.ones_like(IDS, dtype=torch.bool)
    grown.load_plugins(tmp_path / "plugins.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(hidden(grown.backbone), hidden(model.backbone), **EXACT)


# --- attention, generation, biases, the rest


class Maps:
    """A watcher that keeps what it sees."""

    def __init__(self) -> None:
        self.parts: dict[int, list[NDArray[np.float32]]] = {}
        self.seen: list[int] = []

    def see(self, layer: int, seen: int, attention_HST: cci.Attention) -> None:
        for row in range(attention_HST.shape[1]):
            assert not attention_HST[:, row, seen + row + 1 :].any()
        self.parts.setdefault(layer, []).append(np.asarray(attention_HST))


@each
@pytest.mark.parametrize("chunk", [256, 7])
@torch.no_grad()
def test_watched_attention_is_eager_attention(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a text of 20 tokens; windows are of 6."""
    monkeypatch.setattr(cci, "CHUNK", chunk)
    model: Any = tiny(kind)
    model.set_attn_implementation("eager") if kind != "deberta-v2" else None
    expected = model(IDS, output_attentions=True)
    maps = Maps()
    outputs: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda m, a, out: outputs.append(out.last_hidden_state))
    with cci.watched(model):
        cci.watch(model, IDS[0].tolist(), maps)
    hook.remove()
    assert len(maps.parts) == len(expected.attentions) == model.config.num_hidden_layers
    for number, attention in enumerate(expected.attentions):
        found = torch.from_numpy(np.concatenate(maps.parts[number], 1))
        torch.testing.assert_close(found, attention[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0], expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden(model), expected.last_hidden_state, **EXACT)  # nothing is left behind


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_written_row_by_row_is_what_generate_writes(kind: str) -> None:
    """Beyond the window of six tokens, in rows of different lengths side by side."""
    model: Any = tiny(kind, causal=True)
    prompts = [[5, 6, 7], [9] * 11, [3], [3, 2, 4, 2, 5, 9, 2, 6]]
    found = greedy_decode(model, prompts, PAD, 0, 20)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=1
        )
        expected = whole[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(0)] if 0 in expected else expected)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_logits_are_those_of_the_model(kind: str) -> None:
    from cl_dist.models.vocabulary import logits

    model: Any = tiny(kind, causal=True)
    expected = model(IDS).logits
    torch.testing.assert_close(logits(model, model.base_model(IDS).last_hidden_state), expected, rtol=0, atol=1e-5)


@each
def test_biases_are_idle_where_their_gradient_is_rounding_noise_and_nowhere_else(kind: str) -> None:
    over = {"attention_bias": True} if kind in ("llama", "gemma", "olmo", "modernbert") else {}
    model = tiny(kind, **over)
    (hidden(model) * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))).sum().backward()
    idle = no_effect_biases(model)
    paths = tuple(f".{path}.bias" for path in architecture(model).attention.projections)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(paths)}
    assert idle.keys() <= biases.keys()
    for name, parameter in biases.items():
        assert parameter.grad is not None
        counts = parameter.grad.abs() > 1e-4
        if name in idle:
            keep = idle[name]
            assert torch.equal(torch.zeros_like(counts) if keep is None else keep > 0, counts), name
        else:
            assert counts.float().mean() > 0.9, name
    assert bool(idle) == (kind in {"bert", "roberta", "distilbert", "gpt2", "gpt_neox", "phi"})


@each
def test_every_dropout_rate_is_replaced(kind: str) -> None:
    config = {"model_type": kind, **{k: v for k, v in TINY[kind].items() if "drop" not in k}}
    model = load_backbone(parse(ModelConfig, {"source": ".", "config": config, "dropout": 0.25})).train()
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    rates |= {value for name, value in model.config.to_dict().items() if name == "attention_dropout"}
    assert rates == {0.25}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert not torch.equal(hidden(model), hidden(model))


@each
def test_a_model_reads_as_many_tokens_as_its_positions_say_and_no_more(kind: str) -> None:
    for over in ({}, {"position_biased_input": True}) if kind == "deberta-v2" else ({},):
        model = tiny(kind, **over)
        limit = max_positions(model.config.to_dict())
        ids = torch.full((1, (limit or MAX_LENGTH) + 1), 5)
        if limit is None:
            hidden(model, ids)
            continue
        hidden(model, ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError)):
            hidden(model, ids)


@each
def test_lora_changes_queries_and_values_of_every_attention(kind: str) -> None:
    learner = Lora(LoraConfig(r=2), (2,), ModelConfig(source="."), 0)
    learner.build(tiny(kind), 0)
    learner.start_task(0, (0,))
    names = [name for name, p in learner.model.backbone.named_parameters() if p.requires_grad]
    row = architecture(learner.model.backbone)
    places = {row.attention.projections[0], row.attention.projections[-1]}
    assert len(names) == 2 * len(places) * len(layers_of(learner.model.backbone))
    assert all(any(f".{place}.lora_" in name for place in places) for name in names)
