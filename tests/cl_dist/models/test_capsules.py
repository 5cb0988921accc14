"""Expected numbers come from loops over tasks, rows and windows, written from the equations of the paper.

Axes as in cl_dist.models.capsules.
"""

import math
import re
from collections.abc import Iterator
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_dist.models.capsules import Router, Sharing, dynamic_routing, hard_gate, max_conv, squash, task_capsules
from cl_dist.models.config import SharingShape

SHAPE = SharingShape(capsule_mid=6, filters=5)
HIDDEN = 16


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tokens(*lengths: int, width: int) -> Tensor:
    """A mask (B, L) of rows of these lengths, in a batch padded to a width."""
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def sharing(num_tasks: int, **shape: object) -> Sharing:
    """A module with tasks added and every parameter at random, biases too."""
    module = Sharing(SHAPE.updated(shape), HIDDEN)
    for _ in range(num_tasks):
        module.add_task()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


# --- squash


def test_squash_keeps_the_direction_and_maps_length_r_to_r_squared_over_one_plus_r_squared() -> None:
    # |(3, 4, 0)| = 5 -> 25/26; |(0, 0, 0.1)| = 0.1 -> 0.01/1.01
    found = squash(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.1]]))
    expected = torch.tensor([[3 / 5 * 25 / 26, 4 / 5 * 25 / 26, 0.0], [0.0, 0.0, 0.01 / 1.01]])
    torch.testing.assert_close(found, expected)


def test_squash_of_nothing_is_nothing_and_has_a_finite_gradient() -> None:
    v = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(squash(v).sum(), v)
    assert not squash(v).any()
    assert torch.isfinite(gradient).all()


def test_squash_of_half_precision_is_computed_in_float32() -> None:
    v = torch.tensor([[300.0, 300.0, 300.0], [1e-3, 0.0, 0.0]], dtype=torch.float16)  # 300^2 overflows float16
    found = squash(v)
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), torch.tensor([[3**-0.5] * 3, [1e-6, 0.0, 0.0]]), rtol=1e-3, atol=1e-6)


# --- task capsules


def test_capsules_of_all_tasks_at_once_are_those_of_each_task_and_token_alone() -> None:
    x, weight, bias = torch.randn(2, 4, HIDDEN), torch.randn(3, 5, HIDDEN), torch.randn(3, 5)
    found = task_capsules(x, weight, bias)
    assert found.shape == (2, 3, 4, 5)
    for b in range(2):
        for i in range(3):
            for token in range(4):
                p = weight[i] @ x[b, token] + bias[i]
                r = p.norm()
                torch.testing.assert_close(found[b, i, token], p / r * r**2 / (1 + r**2))


# --- max_conv


def slow_max_conv(u_DL: Tensor, weight_CDk: Tensor, length: int) -> Tensor:
    """One row: the best window that starts at a real token, zeros behind the last."""
    best = torch.full((len(weight_CDk),), -math.inf)
    for start in range(length):
        out = torch.zeros(len(weight_CDk))
        for offset in range(weight_CDk.shape[-1]):
            if start + offset < length:
                out += weight_CDk[:, :, offset] @ u_DL[:, start + offset]
        best = torch.maximum(best, out)
    return best


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_max_conv_is_the_best_window_of_the_real_tokens(kernel: int) -> None:
    lengths, u, weight = (6, 1, 4), torch.randn(3, 4, 6), torch.randn(7, 4, kernel)
    mask = tokens(*lengths, width=6)
    found = max_conv(u * mask[:, None], weight, mask)
    expected = torch.stack([slow_max_conv(u[row], weight, length) for row, length in enumerate(lengths)])
    torch.testing.assert_close(found, expected)


def test_padding_cannot_win_the_maximum_of_max_conv() -> None:
    u, weight = -torch.ones(1, 2, 3), torch.ones(1, 2, 1)  # every window of a real token is -2, of padding 0
    for extra in range(4):
        found = max_conv(F.pad(u, (0, extra)), weight, tokens(3, width=3 + extra))
        assert found.item() == -2.0


# --- hard gate


def test_a_gate_is_exactly_zero_or_one_with_the_gradient_of_the_softmax() -> None:
    logits, noise = torch.randn(50, 4, 2, requires_grad=True), torch.randn(50, 4, 2)
    weight = torch.randn(50, 4)
    gate = hard_gate(logits, noise)
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(gate.bool(), (logits + noise)[..., 0] > (logits + noise)[..., 1])
    (found,) = torch.autograd.grad((gate * weight).sum(), logits)
    p = torch.sigmoid((logits + noise)[..., 0] - (logits + noise)[..., 1]).detach()
    slope = weight * p * (1 - p)
    torch.testing.assert_close(found, torch.stack([slope, -slope], -1))


def test_without_noise_the_larger_logit_decides() -> None:
    logits = torch.tensor([[[1.0, 0.9], [-3.0, 2.0], [0.0, 1e-3]]])
    assert hard_gate(logits, None).tolist() == [[1.0, 0.0, 0.0]]


def test_with_gumbel_noise_a_gate_is_open_as_often_as_the_softmax_says() -> None:
    uniform = torch.rand(200_000, 1, 2, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    gates = hard_gate(torch.tensor([[[0.7, -0.3]]]).double(), -torch.log(-torch.log(uniform)))
    assert gates.mean().item() == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.005)


# --- router


def conv_one(u_LD: Tensor, weight_CDk: Tensor, bias_C: Tensor) -> Tensor:
    return slow_max_conv(u_LD.T, weight_CDk, len(u_LD)) + bias_C


def slow_router(
    router: Router, u_BULD: Tensor, lengths: tuple[int, ...], noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Steps 3 to 5 of the knowledge sharing of CTR for one row and one earlier task at a time.

    The gate reads what sets a task apart from the mean of the seen ones, where the paper's reads z_i itself.
    """
    weights = dict(router.named_parameters())
    v, delta = torch.zeros(u_BULD[:, 0].shape), torch.ones(u_BULD.shape[:2])
    t = u_BULD.shape[1] - 1
    for b, length in enumerate(lengths):
        own_LD = u_BULD[b, t, :length]
        pooled = [conv_one(own_LD, weights[f"cur{k}_weight"], weights[f"cur{k}_bias"]).relu() for k in (3, 4, 5)]
        q = weights["current.weight"] @ torch.cat(pooled)
        z = [
            torch.cat(
                [
                    (conv_one(u_BULD[b, i, :length], weights[f"sim{k}_weight"], weights[f"sim{k}_bias"]) + q).relu()
                    for k in (3, 4, 5)
                ]
            )
            for i in range(t + 1)
        ]
        for i in range(t + 1):
            if i < t:
                contrast = z[i] - torch.stack(z).mean(0)
                g = weights["gate.weight"] @ contrast + weights["gate.bias"] + (0.0 if noise is None else noise[b, i])
                delta[b, i] = float(g[0] > g[1])
            a = weights["amount.weight"] @ z[i] + weights["amount.bias"]
            for token in range(length):
                v[b, token] += delta[b, i] * a * u_BULD[b, i, token]
    return v, delta


@pytest.mark.parametrize("noisy", [False, True])
def test_a_router_does_what_the_paper_says_of_one_task_and_row(noisy: bool) -> None:
    router, lengths = Router(SHAPE, HIDDEN), (5, 2, 7, 1, 6, 3)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    u = torch.randn(6, 4, 7, 9)
    noise = torch.randn(6, 3, 2) if noisy else None
    mask = tokens(*lengths, width=7)
    with torch.no_grad():
        v, delta = router(u, mask, noise)
        expected_v, expected_delta = slow_router(router, u, lengths, noise)
    assert 0 < delta[:, :-1].mean() < 1  # of both kinds, or this would show little
    torch.testing.assert_close(delta, expected_delta, rtol=0, atol=0)
    torch.testing.assert_close(v * mask[..., None], expected_v, rtol=1e-4, atol=1e-5)


def test_a_closed_gate_passes_nothing_and_no_gradient_to_its_capsule() -> None:
    router, mask = Router(SHAPE, HIDDEN), tokens(4, 4, width=4)
    u = torch.randn(2, 3, 4, 9, requires_grad=True)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.copy_(torch.tensor([-1.0, 1.0]))
    v, delta = router(u, mask, None)
    assert delta.tolist() == [[0.0, 0.0, 1.0]] * 2
    alone, _ = router(u[:, -1:], mask, None)
    torch.testing.assert_close(v, alone)


def test_a_first_task_passes_its_own_capsule_whatever_its_gate_says() -> None:
    router = Router(SHAPE, HIDDEN)
    with torch.no_grad():
        router.gate.bias.copy_(torch.tensor([-9.0, 9.0]))
    v, delta = router(torch.randn(2, 1, 4, 9), tokens(4, 3, width=4), None)
    assert delta.tolist() == [[1.0], [1.0]]
    assert v.abs().max() > 0


def test_amounts_start_near_one_and_gates_undecided() -> None:
    router, u = Router(SharingShape(), 768), 0.1 * torch.randn(20, 4, 8, 9)
    v, delta = router(u, tokens(*[8] * 20, width=8), None)
    passed = (delta[:, :, None, None] * u).sum(1)
    cosine = F.cosine_similarity(v.flatten(), passed.flatten(), dim=0)
    assert cosine > 0.95
    assert not router.gate.weight.any()
    assert not router.gate.bias.any()


def test_a_step_on_the_gate_tells_capsules_apart() -> None:
    """Opening one of two capsules pays: the gate of the other must not be opened by the same step."""
    router, u = Router(SharingShape(), 768), 0.3 * torch.randn(20, 3, 8, 9)
    u[:, 0] += 0.3 * torch.randn(9)  # capsules of different tasks speak of different things
    gates: list[Tensor] = []
    router.gate.register_forward_hook(lambda _module, _args, output: gates.append(output))
    optimizer = torch.optim.AdamW(router.gate.parameters(), lr=0.01)
    for _ in range(2):
        _, delta = router(u, tokens(*[8] * 20, width=8), None)
        (-delta[:, 0].sum()).backward()
        optimizer.step()
    first, other = (gates[1][:, i, 0] - gates[1][:, i, 1] for i in (0, 1))
    assert first.mean() > 0.2
    assert other.mean() < 0.3 * first.mean()


# --- dynamic routing


def test_dynamic_routing_is_the_loop_of_sabour() -> None:
    u = torch.randn(2, 3, 4, 2, 5)  # B, U, L, J, d
    found = dynamic_routing(u, rounds=3)
    for b in range(2):
        for token in range(4):
            logits = torch.zeros(3, 2)
            for _ in range(3):
                v = torch.zeros(2, 5)
                for j in range(2):
                    s = torch.zeros(5)
                    for i in range(3):
                        s += logits[i].softmax(0)[j] * u[b, i, token, j]
                    v[j] = s / s.norm() * s.norm() ** 2 / (1 + s.norm() ** 2)
                for i in range(3):
                    for j in range(2):
                        logits[i, j] += u[b, i, token, j] @ v[j]
            torch.testing.assert_close(found[b, token], v, rtol=1e-4, atol=1e-5)


# --- the module


def test_two_layers_of_a_capsule_are_one_map() -> None:
    module, x = sharing(3, capsule_layers=2), torch.randn(2, 4, HIDDEN)
    found = task_capsules(x, *module._composed(3))
    for i in range(3):
        own = {name: getattr(module, f"capsule{i}_{name}") for name in ("weight0", "bias0", "weight1", "bias1")}
        p = F.linear(F.linear(x, own["weight0"], own["bias0"]), own["weight1"], own["bias1"])
        torch.testing.assert_close(found[:, i], squash(p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("routing", ["transfer", "dynamic"])
def test_sharing_is_capsule_routing_matrix_router_and_up_projection_of_each_task(layers: int, routing: str) -> None:
    module = sharing(3, capsule_layers=layers, routing=routing)
    x, mask = torch.randn(2, 4, HIDDEN), tokens(4, 3, width=4)
    with torch.no_grad():
        found, delta = module(x, 2, mask, None)
        u = torch.zeros(2, 3, 4, 3, 3)
        for i in range(3):
            p = x @ getattr(module, f"capsule{i}_weight0").T + getattr(module, f"capsule{i}_bias0")
            if layers == 2:
                p = p @ getattr(module, f"capsule{i}_weight1").T + getattr(module, f"capsule{i}_bias1")
            for j in range(3):
                u[:, i, :, j] = squash(p) @ getattr(module, f"route{i}")[j]
        if routing == "dynamic":
            v, expected_delta = dynamic_routing(u).flatten(-2), None
        else:
            v, expected_delta = module.routers["2"](u.flatten(-2), mask, None)
        torch.testing.assert_close(found, module.ups["2"](v), rtol=1e-4, atol=1e-5)
    assert (delta is None) == (expected_delta is None)
    if delta is not None:
        torch.testing.assert_close(delta, expected_delta, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_or_not_earlier_capsules_compute_the_same(frozen: bool) -> None:
    module, x, mask = sharing(3), torch.randn(2, 4, HIDDEN), tokens(4, 3, width=4)
    expected, _ = module(x, 2, mask, None)
    for task in (0, 1):
        for parameter in module.capsule_parameters(task):
            parameter.requires_grad_(not frozen)
    found, _ = module(x, 2, mask, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_parameters_of_the_tasks_are_the_modules_own_each_once() -> None:
    module = sharing(12)  # capsule1_ is also how capsule10 and capsule11 begin
    sets = [{id(parameter) for parameter in module.task_parameters(task)} for task in range(12)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(list(module.parameters()))


def test_capsule_parameters_are_maps_and_routing_row() -> None:
    module, numbers = sharing(11), count()
    for parameter in module.parameters():
        parameter.data.fill_(float(next(numbers)))
    own = {parameter.flatten()[0].item() for parameter in module.capsule_parameters(1)}
    names = {name for name, parameter in module.named_parameters() if parameter.flatten()[0].item() in own}
    assert names == {"route1", *(f"capsule1_{kind}{layer}" for kind in ("weight", "bias") for layer in (0, 1))}


@pytest.mark.parametrize("routing", ["transfer", "dynamic"])
def test_inherit_copies_estimator_up_projection_and_routing_row_but_no_capsule_and_no_gate(routing: str) -> None:
    module = sharing(3, routing=routing)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module.inherit(2, source=1)
    for name, parameter in module.named_parameters():
        copied = name == "route2" or (name.startswith(("routers.2.", "ups.2.")) and ".gate." not in name)
        source = name.replace("2", "1", 1) if copied else name
        torch.testing.assert_close(parameter.detach(), before[source], rtol=0, atol=0, msg=name)
    assert (module.routers["2"] is not module.routers["1"]) if routing == "transfer" else not module.routers


# --- one router for all tasks, and gates decided by hand


def test_a_shared_router_routing_row_and_up_projection_are_trained_by_every_task() -> None:
    module = sharing(3, routing_scope="shared")
    names = {name for name, _ in module.named_parameters() if not name.startswith("capsule")}
    assert names
    assert all(re.match(r"route0$|routers\.0\.|ups\.0\.", name) for name in names)
    trained = {id(parameter) for parameter in module.task_parameters(2)}
    own = {id(p) for n, p in module.named_parameters() if not n.startswith(("capsule0", "capsule1"))}
    assert trained == own
    assert len(module.task_parameters(2)) == len(trained)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module.inherit(2, source=0)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


def test_a_shared_routing_row_is_the_same_as_equal_rows_of_each_task() -> None:
    one, each = sharing(3, routing_scope="shared"), sharing(3)
    values = dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in each.named_parameters():
            shared = re.sub(r"^(routers\.|ups\.|route)\d", r"\g<1>0", name)
            parameter.copy_(values[shared if shared in values else name])
    x, mask, noise = torch.randn(2, 5, HIDDEN), tokens(5, 3, width=5), torch.randn(2, 2, 2)
    for found, expected in zip(one(x, 2, mask, noise), each(x, 2, mask, noise), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_up_projection_that_starts_at_zero_adds_nothing() -> None:
    x, mask = torch.randn(2, 5, HIDDEN), tokens(5, 3, width=5)
    for kind, adds in (("zero", False), ("normal", True)):
        module = Sharing(SHAPE.updated({"up_init": kind}), HIDDEN)
        module.add_task()
        assert module(x, 0, mask, None)[0].any().item() is adds


@pytest.mark.parametrize("routing", ["transfer", "none", "dynamic"])
def test_gates_decided_by_hand_open_and_close_the_earlier_capsules(routing: str) -> None:
    module, x, mask = sharing(3, routing=routing), torch.randn(2, 5, HIDDEN), tokens(5, 3, width=5)
    found = {k: module(x, 2, mask, None, torch.tensor([[k, k], [k, k]]))[0] for k in (0.0, 1.0)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("capsule0", "capsule1")):
                parameter.add_(1.0)  # other knowledge in the earlier capsules
    again = {k: module(x, 2, mask, None, torch.tensor([[k, k], [k, k]]))[0] for k in (0.0, 1.0)}
    assert (found[1.0] - again[1.0]).abs().max() > 1e-3
    torch.testing.assert_close(found[0.0], again[0.0], rtol=0, atol=0)
