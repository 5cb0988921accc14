from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_dist.learners.base import Progress
from cl_dist.learners.ctr import Ctr
from cl_dist.learners.hat import Hat
from cl_dist.methods.ctr import CtrConfig
from cl_dist.methods.hat import HatConfig
from cl_dist.models.classifier import Classifier
from cl_dist.models.config import MaskShape, ModelConfig
from cl_dist.models.noise import gumbel
from cl_dist.models.plugin import CtrClassifier, pack, unpack
from cl_dist.models.plugin_layer import Plugin
from cl_dist.models.task_modules import TaskNorms
from cl_dist.stages.schedule import Schedule
from tests.encoders import KINDS, SHAPE, batch_of, encoder, select, snapshot, train, with_plugins

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
ROUTINGS = ("transfer", "dynamic")
MASKS = {name: value for name, value in SHAPE.changed().items() if name in MaskShape.model_fields}


def learner_of(kind: str = "bert", num_tasks: int = 2, seed: int = 0, **settings_: Any) -> Ctr:
    """The real learner of CTR, its model having parts for all the tasks."""
    learner = Ctr(CtrConfig(**SHAPE.changed() | settings_), (2,) * num_tasks, ModelConfig(source="."), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner.build(encoder(kind), num_tasks - 1)
    return learner


@torch.no_grad()
def logits(model: CtrClassifier, task: int, batch: dict[str, Tensor] | None = None) -> Tensor:
    model.activate(task)
    return model(batch_of() if batch is None else batch)


def pin_gates(model: CtrClassifier, task: int, is_open: bool) -> None:
    """Make the routers of a task open (or close) every gate."""
    for sharing in model.sharings:
        gate: Any = sharing.routers[str(task)].get_submodule("gate")
        gate.weight.data.zero_()
        gate.bias.data.copy_(torch.tensor([9.0, -9.0] if is_open else [-9.0, 9.0]))


def halfway() -> Progress:
    return Schedule(total_steps=10, steps_per_epoch=10, min_round_steps=10).at(5)


# --- where plugins sit


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_and_task_norms_sit_behind_every_sub_block(kind: str) -> None:
    model = with_plugins(kind)
    assert model.plugin_names == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    assert [plugin.index for plugin in model.plugins] == [0, 1, 2, 3]
    assert [module for module in model.modules() if isinstance(module, Plugin)] == model.plugins
    assert sum(isinstance(module, TaskNorms) for module in model.modules()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plugin_returns_is_added_to_its_sub_blocks_input_and_normalised(kind: str) -> None:
    model = with_plugins(kind)
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (args[0] if args else None, output)

        return hook

    for number, (plugin, norms) in enumerate(zip(model.plugins, model.norms, strict=True)):
        plugin.register_forward_hook(note(f"plugin{number}"))
        norms.register_forward_hook(note(f"norm{number}"))
    model.backbone.get_submodule("embeddings").register_forward_hook(note("embeddings"))
    with torch.no_grad():
        model(batch_of())
    stream = seen["embeddings"][1]
    for number in range(4):
        torch.testing.assert_close(seen[f"norm{number}"][0], stream + seen[f"plugin{number}"][1])
        stream = seen[f"norm{number}"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_with_closed_masks_the_backbone_answers_alone(kind: str) -> None:
    model, batch = with_plugins(kind), batch_of()
    assert (vectors(model, batch) - plain_vectors(kind, batch)).abs().max() > 1e-3
    for plugin in model.plugins:
        plugin.gates(0)[1].data.fill_(-1.0)  # the second layer's mask alone shuts the module
    torch.testing.assert_close(vectors(model, batch), plain_vectors(kind, batch), **EXACT)
    for plugin in model.plugins:
        for gate, value in zip(plugin.gates(0), (-1.0, 1.0), strict=True):  # the first layer's: its biases are zero
            gate.data.fill_(value)
    torch.testing.assert_close(vectors(model, batch), plain_vectors(kind, batch), **EXACT)


@torch.no_grad()
def vectors(model: CtrClassifier, batch: dict[str, Tensor]) -> Tensor:
    model(batch)
    return model.backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state


@torch.no_grad()
def plain_vectors(kind: str, batch: dict[str, Tensor]) -> Tensor:
    return encoder(kind)(batch["input_ids"], batch["attention_mask"]).last_hidden_state


def test_a_plugin_is_sharing_then_two_gated_layers_beside_a_skip() -> None:
    model, batch = with_plugins(num_tasks=2), batch_of()
    model(batch)
    plugin, x = model.plugins[0], torch.randn(6, 12, 32)
    plugin.inner = torch.nn.Identity()
    with torch.no_grad():
        mask1, mask2 = ((gate > 0).float() for gate in plugin.gates(1))
        assert model.context.token_mask_BL is not None
        shared, _ = model.sharings[0](x, 1, model.context.token_mask_BL, None)
        k1 = torch.relu((x + shared) @ plugin.fc1.weight.T + plugin.fc1.bias) * mask1
        k2 = torch.relu(k1 @ plugin.fc2.weight.T + plugin.fc2.bias) * mask2
        torch.testing.assert_close(plugin(x), x + k2)
        assert shared.abs().max() > 1e-3


# --- (i) a row is its own


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_order_or_padding(kind: str, routing: str) -> None:
    model, batch = with_plugins(kind, num_tasks=3, shape=SHAPE.updated({"routing": routing})), batch_of()
    model.context.slope = 3.0
    lengths, order = batch["attention_mask"].sum(1).tolist(), [3, 0, 5, 2, 1, 4]

    def run(part: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        model.context.noise_PBU2 = gumbel(1, 2, part["row"], len(model.plugins), 2)
        with torch.no_grad():
            found = model(part)
        return found, torch.stack(model.context.gates) if model.context.gates else None

    expected, gates = run(batch)
    if gates is not None:
        assert 0 < gates[:, :, :-1].mean() < 1
    for rows, length in (
        *(([row], lengths[row]) for row in range(6)),  # alone, without padding
        (order, None),
        ([4, 1], 7),  # others, less padding
    ):
        found, found_gates = run(select(batch, rows, length))
        torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=1e-5)
        if gates is not None and found_gates is not None:
            torch.testing.assert_close(found_gates, gates[:, rows], **EXACT)
    found, _ = run(batch_of(pad_to=20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- (ii) later tasks do not exist


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_later_tasks_change_no_bit_of_an_earlier_ones_logits(kind: str, routing: str) -> None:
    shape = SHAPE.updated({"routing": routing})
    model = with_plugins(kind, num_tasks=2, shape=shape)
    before = [logits(model, task) for task in (0, 1)]
    model.add_task(3)
    for parameter in model.task_parameters(2):
        torch.nn.init.normal_(parameter, std=9.0)
    for task in (0, 1):
        torch.testing.assert_close(logits(model, task), before[task], **EXACT)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_later_tasks_get_no_gradient_and_every_part_of_the_tasks_own_gets_one(routing: str) -> None:
    model = with_plugins(num_tasks=3, shape=SHAPE.updated({"routing": routing}))
    model.requires_grad_()
    model.activate(1)
    model.context.slope = 1.0
    model.context.noise_PBU2 = gumbel(0, 0, torch.arange(6), len(model.plugins), 1)
    model(batch_of()).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.task_parameters(2))
    assert all(parameter.grad is not None for parameter in model.task_parameters(1))


# --- who trains


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_no_backbone_weight_and_all_of_the_tasks_own(kind: str) -> None:
    learner = learner_of(kind)
    before = snapshot(learner.model)
    train(learner, 0, [batch_of(seed=seed) for seed in range(4)])
    own = {id(p) for p in learner.model.task_parameters(0)}
    own |= {id(p) for plugin in learner.model.plugins for layer in (plugin.fc1, plugin.fc2) for p in layer.parameters()}
    for name, parameter in learner.model.named_parameters():
        idle = name.endswith((".gate.weight", ".gate.bias"))  # a first task has no gate to decide
        assert torch.equal(parameter, before[name]) == (id(parameter) not in own or idle), name
    assert sum(id(p) not in own for name, p in learner.model.named_parameters() if ".inner." not in name) > 0


def test_old_logits_do_not_move_by_a_bit_in_no_forgetting_mode() -> None:
    learner = learner_of(num_tasks=3)
    before: list[Tensor] = []
    for task in range(3):
        train(learner, task, [batch_of(seed=seed) for seed in range(task, task + 6)])
        if task == 1:
            pin_gates(learner.model, 1, is_open=True)  # so that the answer hangs on the capsule of task 0
        for earlier, expected in enumerate(before):
            torch.testing.assert_close(logits(learner.model, earlier), expected, **EXACT)
        before.append(logits(learner.model, task))


@pytest.mark.parametrize("is_open", [True, False])
def test_in_backward_transfer_mode_an_open_gate_lets_an_old_capsule_learn(is_open: bool) -> None:
    learner = learner_of(num_tasks=2, mode="backward_transfer")
    train(learner, 0, [batch_of(seed=seed) for seed in range(4)])
    learner.start_task(1, (1,))
    pin_gates(learner.model, 1, is_open)
    loss = learner.loss(learner.model, batch_of(), halfway())
    loss.per_example["ce"].sum().backward()
    for sharing in learner.model.sharings[:-1]:
        for parameter in sharing.capsule_parameters(0):
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == is_open


def test_a_whole_training_in_backward_transfer_mode_changes_old_logits() -> None:
    learner = learner_of(num_tasks=2, mode="backward_transfer")
    train(learner, 0, [batch_of(seed=seed) for seed in range(4)])
    before = logits(learner.model, 0)
    train(learner, 1, [batch_of(seed=seed) for seed in range(4, 10)])
    assert not torch.equal(logits(learner.model, 0), before)


def test_gates_of_other_tasks_never_move() -> None:
    learner = learner_of(num_tasks=3)
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    plugins = learner.model.plugins
    before = [[gate.detach().clone() for task in (0, 1, 2) for gate in plugin.gates(task)] for plugin in plugins]
    masks = learner.model.masks()
    train(learner, 1, [batch_of(seed=seed) for seed in range(3, 9)], weight_decay=0.5)
    for plugin, old in zip(plugins, before, strict=True):
        for place, gate in enumerate(gate for task in (0, 1, 2) for gate in plugin.gates(task)):
            assert torch.equal(gate, old[place]) == (place not in (2, 3))
    for name, bits in learner.model.masks().items():
        torch.testing.assert_close(bits[:1], masks[name], **EXACT)


def test_units_that_an_earlier_task_uses_do_not_move_and_free_ones_do() -> None:
    learner = learner_of(num_tasks=2)
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    before = snapshot(learner.model)
    train(learner, 1, [batch_of(seed=seed) for seed in range(3, 9)], weight_decay=0.5)
    names: dict[Tensor, str] = {parameter: name for name, parameter in learner.model.named_parameters()}
    for plugin in learner.model.plugins:
        used1, used2 = plugin.mask1[0], plugin.mask2[0]
        protected: dict[Tensor, Tensor] = {
            plugin.fc1.weight: used1[:, None].expand_as(plugin.fc1.weight),
            plugin.fc1.bias: used1,
            plugin.fc2.weight: used2[:, None] & used1[None, :],
            plugin.fc2.bias: used2,
        }
        for parameter, kept in protected.items():
            moved = parameter != before[names[parameter]]
            assert not (moved & kept).any()
            assert (moved & ~kept).any()
            if parameter is plugin.fc2.weight:  # also where one of its two ends is used
                assert (moved & used2[:, None] & ~used1[None, :]).any()
                assert (moved & ~used2[:, None] & used1[None, :]).any()


def test_the_router_learns_from_the_second_task_on() -> None:
    learner = learner_of(num_tasks=2)
    for task in (0, 1):
        learner.start_task(task, (task,))
        loss = learner.loss(learner.model, batch_of(), halfway())
        loss.per_example["ce"].sum().backward()
        for sharing in learner.model.sharings:
            for other, router in sharing.routers.items():
                gradients = [parameter.grad for parameter in router.get_submodule("gate").parameters()]
                learns = task == 1 and other == "1"
                assert all((gradient is not None) == learns for gradient in gradients), (task, other)
                assert not learns or any(gradient is not None and gradient.any() for gradient in gradients)
        learner.model.zero_grad()
        learner.model.activate(task)
        learner.model.finish_task()


def test_with_inherit_a_task_starts_from_its_predecessor_with_a_capsule_of_its_own() -> None:
    learner = learner_of(num_tasks=2, inherit="previous")
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    learner.start_task(1, (1,))
    for sharing, norms in zip(learner.model.sharings, learner.model.norms, strict=True):
        own = dict(sharing.named_parameters())
        pairs = [(own["route0"], own["route1"])]
        pairs += zip(norms.norms[0].parameters(), norms.norms[1].parameters(), strict=True)
        taken = [n for n in own if n.startswith(("ups.0", "routers.0")) and ".gate." not in n]
        pairs += [(own[n], own[n.replace("0", "1", 1)]) for n in taken]
        assert len(pairs) == 1 + 2 + 2 + 15  # routing row, norm, up-projection; 6 convolutions, W_c, W_a
        for old, new in pairs:
            torch.testing.assert_close(old, new, **EXACT)
        assert not torch.equal(own["capsule0_weight0"], own["capsule1_weight0"])
    for plugin in learner.model.plugins:
        for old, new in zip(plugin.gates(0), plugin.gates(1), strict=True):
            torch.testing.assert_close(old, new, **EXACT)
    torch.testing.assert_close(learner.model.heads[0].weight, learner.model.heads[1].weight, **EXACT)


def test_the_nearest_task_is_the_one_whose_sentence_vectors_predict_the_labels() -> None:
    learner = learner_of(num_tasks=3, inherit="nearest")
    batch = batch_of((9,) * 24)
    batch["label"] = torch.arange(24) % 2
    for plugin in learner.model.plugins:  # the last sub-block of task 1 marks a token that label 1 has
        for layer in (plugin.fc1, plugin.fc2):
            torch.nn.init.zeros_(layer.weight)
    batch["input_ids"][:, 0] = torch.where(batch["label"] == 1, 7, 8)
    for task in (0, 1):
        learner.model.activate(task)
        learner.model.finish_task()
    table = learner.model.backbone.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    signal = torch.nn.functional.normalize(table.weight[7] - table.weight[8], dim=0)
    last = learner.model.plugins[-1]
    with torch.no_grad():
        last.fc1.weight[:] = 6.0 * signal
        last.fc2.weight[:, 0] = 3.0 * torch.randn(last.fc2.weight.shape[0], generator=torch.Generator().manual_seed(0))
        last.mask1.fill_(False)
        last.mask2.fill_(True)
        last.mask1[1, 0] = True  # of all earlier tasks task 1 alone reads the unit
    halves = [select(batch, list(range(12))), select(batch, list(range(12, 24)))]
    assert learner.nearest(halves) == 1
    last.mask1[1, 0], last.mask1[0, 0] = False, True
    assert learner.nearest(halves) == 0
    assert not learner.model.context.plain
    with torch.no_grad():  # earlier tasks lose what the backbone alone tells
        for norm in learner.model.norms[-1].norms[:2]:
            norm.get_parameter("weight").zero_()
    assert learner.nearest([batch]) is None


@pytest.mark.parametrize("size", [1, 12])
def test_rows_of_one_label_name_no_nearest_task(size: int) -> None:
    learner = learner_of(num_tasks=2, inherit="nearest")
    batch = batch_of((9,) * size)
    batch["label"] = torch.zeros(size, dtype=torch.long)
    assert learner.nearest([batch]) is None


def test_a_task_that_inherits_the_previous_one_names_it_as_its_source() -> None:
    learner = learner_of(num_tasks=3, inherit="previous")
    learner.start_task(2, (0, 1, 2))
    assert learner.source == 1


def test_masks_and_heads_of_ctr_and_hat_start_equal_and_those_of_other_tasks_and_seeds_do_not() -> None:
    ctr, same = learner_of(num_tasks=2), Hat(HatConfig(**MASKS), (2, 2), ModelConfig(source="."), 0)
    other, first = learner_of(num_tasks=2, seed=1), learner_of(num_tasks=1)
    with torch.random.fork_rng():
        torch.manual_seed(5)  # whatever has been drawn before
        same.build(encoder(), 1)

    def drawn(learner: Hat, task: int) -> Tensor:
        gates = [gate.flatten() for plugin in learner.model.plugins for gate in plugin.gates(task)]
        return torch.cat([*gates, learner.model.heads[task].get_parameter("weight").flatten()]).detach()

    torch.testing.assert_close(drawn(ctr, 1), drawn(same, 1), **EXACT)
    assert (drawn(ctr, 1) == drawn(first, 0)).float().mean() < 0.01
    assert (drawn(ctr, 1) == drawn(other, 1)).float().mean() < 0.01


def test_the_noise_of_the_routers_differs_between_tasks_and_ends_where_the_settings_say() -> None:
    schedule, batch, found = Schedule(total_steps=10, steps_per_epoch=10, min_round_steps=10), batch_of(), {}
    for task in (1, 2):
        learner = learner_of(num_tasks=task + 1, noise_share=0.5)
        for earlier in range(task):
            learner.model.activate(earlier)
            learner.model.finish_task()
        learner.start_task(task, (task,))
        for step in range(10):
            learner.loss(learner.model, batch, schedule.at(step))
            noise = learner.model.context.noise_PBU2
            assert noise is not None
            assert bool(noise.any()) == (step < 4)
            found[task, step] = noise[:, :, 0]
    assert not torch.equal(found[1, 0], found[2, 0])
    assert found[1, 0].abs().mean() > 2 * found[1, 3].abs().mean()


def test_knowledge_sharing_has_a_learning_rate_of_its_own() -> None:
    learner = learner_of(num_tasks=2, sharing_lr=0.03, gate_lr=0.02)
    rates = learner.learning_rates()
    named = dict(learner.model.named_parameters())
    assert {name for name, rate in rates.items() if rate == 0.03} == {name for name in named if ".sharing." in name}
    assert {name for name, rate in rates.items() if rate == 0.02} == {
        name for name in named if ".gate1_" in name or ".gate2_" in name
    }


def test_earlier_capsules_are_closed_or_opened_by_coins_for_an_ablation() -> None:
    learner = learner_of(num_tasks=2)
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    train(learner, 1, [batch_of(seed=seed) for seed in range(3)])
    pin_gates(learner.model, 1, is_open=True)
    for plugin in learner.model.plugins:
        for layer in (plugin.fc1, plugin.fc2):
            torch.nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    found, opened = {}, {}
    for without in (None, "earlier", "gates", "sharing"):
        learner.activate(1, without)
        with torch.no_grad():
            found[without] = learner.model(batch_of())
        opened[without] = learner.observe()
    assert opened[None]["gate_open"].mean() == 1
    assert opened["earlier"]["gate_open"].mean() == 0
    assert 0.2 < opened["gates"]["gate_open"].mean() < 0.8
    assert not opened["sharing"]
    learner.activate(1)
    pin_gates(learner.model, 1, is_open=False)
    with torch.no_grad():
        torch.testing.assert_close(learner.model(batch_of()), found["earlier"], **EXACT)
    assert len({value.sum().item() for value in found.values()}) == 4


def test_without_its_plugins_the_backbone_answers_alone() -> None:
    learner, batch = learner_of(num_tasks=1), batch_of()
    learner.activate(0)
    learner.model.context.plain = True
    with torch.no_grad():
        found = learner.model.vectors(batch)
        learner.model.context.plain = False
        assert not torch.equal(found, learner.model.vectors(batch))
        torch.testing.assert_close(found, Classifier(encoder(), None).vectors(batch), **EXACT)


# --- evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_is_deterministic_and_knows_nothing_of_the_training_before_it(kind: str) -> None:
    learner, found = learner_of(kind), []
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    learner.start_task(1, (1,))
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():  # leaves a slope and noise behind
            learner.loss(learner.model, batch_of(seed=seed), Schedule(10, 10, 10).at(seed))
            learner.activate(1)
            found.append((learner.model(batch_of()), learner.observe()["gate_open"]))
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert learner.observe()["gate_open"].shape == (6, 4, 1)  # rows, plugins, earlier tasks


def test_a_finished_task_answers_with_the_masks_it_ended_with() -> None:
    learner = learner_of(num_tasks=2)
    train(learner, 0, [batch_of()])
    before = logits(learner.model, 0)
    for plugin in learner.model.plugins:
        for gate in plugin.gates(0):
            gate.data.neg_()  # the embeddings count no more
    torch.testing.assert_close(logits(learner.model, 0), before, **EXACT)


def test_switching_sharing_off_changes_the_answer() -> None:
    learner = learner_of(num_tasks=2)
    train(learner, 0, [batch_of(seed=seed) for seed in range(3)])
    for plugin in learner.model.plugins:  # with weights as small as at the start, plugins say little
        for layer in (plugin.fc1, plugin.fc2):
            torch.nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    found = []
    for without in (None, "sharing", None):
        learner.activate(0, without)
        with torch.no_grad():
            found.append(learner.model(batch_of()))
    torch.testing.assert_close(found[0], found[2], **EXACT)
    assert (found[0] - found[1]).abs().max() > 1e-3


# --- masks and files


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_masks_survive_packing(tasks: int, units: int, seed: int) -> None:
    mask = torch.rand(tasks, units, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack(mask)
    assert bits.dtype is torch.uint8
    assert bits.shape == (tasks, (units + 7) // 8)
    torch.testing.assert_close(unpack(bits, units), mask, **EXACT)


def test_bits_are_packed_least_significant_first() -> None:
    mask = torch.tensor([[True, False, False, False, False, False, False, True, False, True]])
    assert pack(mask).tolist() == [[129, 2]]


def test_finished_masks_are_the_signs_of_the_embeddings_and_travel_with_the_learner() -> None:
    learner = learner_of(num_tasks=2)
    train(learner, 0, [batch_of()])
    other = learner_of(num_tasks=2, seed=5)
    other.load_state_dict(learner.state_dict())
    for plugin, copy in zip(learner.model.plugins, other.model.plugins, strict=True):
        for mask, gate in zip((copy.mask1, copy.mask2), plugin.gates(0), strict=True):
            torch.testing.assert_close(mask, (gate.detach() > 0)[None], **EXACT)
        expected = [mask[0].float() for mask in (plugin.mask1, plugin.mask2)]
        torch.testing.assert_close(list(copy.used(1)), expected, **EXACT)
        assert not any(mask.any() for mask in copy.used(0))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_plugins_saved_and_loaded_alone_answer_as_before(kind: str, routing: str, tmp_path: Path) -> None:
    learner, path = learner_of(kind, routing=routing), tmp_path / "plugins.safetensors"
    for task in (0, 1):
        train(learner, task, [batch_of(seed=seed) for seed in range(3)])
    learner.model.save_plugins(path)
    fresh = with_plugins(kind, num_tasks=2, shape=SHAPE.updated({"routing": routing}), seed=9)
    assert not torch.equal(logits(fresh, 1), logits(learner.model, 1))
    fresh.load_plugins(path)
    torch.testing.assert_close(fresh.masks(), learner.model.masks(), **EXACT)
    for task in (0, 1):
        torch.testing.assert_close(logits(fresh, task), logits(learner.model, task), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_the_plugins_holds_no_weight_of_the_backbone(kind: str, tmp_path: Path) -> None:
    model, path, plain = with_plugins(kind, num_tasks=2), tmp_path / "plugins.safetensors", encoder(kind)
    model.save_plugins(path)
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    weights = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    assert not [name for name, value in found.items() if any(torch.equal(value, weight) for weight in weights)]
    all_names = {name for name, _ in model.named_parameters()}
    kept_out = all_names - set(found)
    # What is not in the file is the backbone: its own parameters, each once. Norms are in it, as copies per task.
    assert len(kept_out) == len(list(plain.parameters()))


def test_a_file_of_another_task_count_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "plugins.safetensors"
    with_plugins(num_tasks=2).save_plugins(path)
    for num_tasks in (1, 3):
        with pytest.raises(ValueError, match=r"plugins\.safetensors: does not match this model or its number of tasks"):
            with_plugins(num_tasks=num_tasks).load_plugins(path)


def test_pieces_of_parameters_are_not_saved(tmp_path: Path) -> None:
    model, path = with_plugins(), tmp_path / "plugins.safetensors"
    parameter: Any = model.plugins[0].fc1.weight
    values, parameter.ds_shape = parameter.data, parameter.shape
    parameter.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
    with pytest.raises(ValueError, match=r"parameters are partitioned, such as '.*fc1\.weight'; .*GatheredParameters"):
        model.save_plugins(path)
    parameter.data = values  # gathered
    model.save_plugins(path)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor(next(name for name in file.keys() if "fc1.weight" in name)), values)  # noqa: SIM118


# --- cost


class Operations(TorchDispatchMode):
    """Counts the aten operations of a block, those of its backward pass too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def operations_of_a_plugin(num_tasks: int, routing: str) -> tuple[int, int]:
    model = with_plugins(num_tasks=num_tasks, shape=SHAPE.updated({"routing": routing}))
    for plugin in model.plugins:  # as if the earlier tasks were finished
        plugin.mask1 = torch.zeros(num_tasks - 1, plugin.mask1.shape[1], dtype=torch.bool)
        plugin.mask2 = torch.zeros(num_tasks - 1, plugin.mask2.shape[1], dtype=torch.bool)
    model.start_task(num_tasks - 1)
    batch = batch_of()
    model.context.token_mask_BL = batch["attention_mask"].bool()
    model.context.slope = 1.0
    model.context.noise_PBU2 = gumbel(0, 0, batch["row"], len(model.plugins), num_tasks - 1)
    plugin = model.plugins[0]
    plugin.inner = torch.nn.Identity()
    x = torch.randn(6, 12, 32, requires_grad=True)
    with Operations() as forward:
        output = plugin(x)
    with Operations() as backward:
        output.sum().backward()
    return forward.count, backward.count


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_plugin_takes_as_many_operations_for_any_number_of_tasks(routing: str) -> None:
    """So no Python loop computes the earlier capsules: there is one of getattr alone, which reads their parameters out.

    With one earlier task its slice of a tensor is contiguous, which may spare a copy.
    """
    counts = {num_tasks: sum(operations_of_a_plugin(num_tasks, routing)) for num_tasks in (2, 5, 10, 19)}
    assert counts[5] == counts[10] == counts[19]
    assert counts[5] - counts[2] in (0, 1)
    assert 50 < counts[10] < 700  # the release: 692 for two tasks, 2716 for ten
