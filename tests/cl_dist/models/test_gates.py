import math

import pytest
import torch
from torch import Tensor

from cl_dist.models.gates import LIMIT, Gate, binary, slope, sparsity

S_MAX = 400.0


def gradient(e: Tensor, s: float, weight: Tensor | None = None) -> Tensor:
    """dL/de for L = sum(weight * Gate(e))."""
    e = e.clone().requires_grad_()
    mask = Gate.apply(e, s, S_MAX)
    (found,) = torch.autograd.grad((mask * (1.0 if weight is None else weight)).sum(), e)
    return found


@pytest.mark.parametrize(("step", "expected"), [(0, 1 / 400), (50, 200.00125), (100, 400.0)])
def test_slope_rises_from_one_over_s_max_to_s_max(step: int, expected: float) -> None:
    assert slope(step, cycle=101, s_max=S_MAX) == pytest.approx(expected)


def test_a_cycle_of_one_step_has_the_smallest_slope() -> None:
    assert slope(0, cycle=1, s_max=S_MAX) == pytest.approx(1 / S_MAX)


@pytest.mark.parametrize("step", [-1, 101])
def test_a_step_outside_the_cycle_names_the_value(step: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}"):
        slope(step, cycle=101, s_max=S_MAX)


@pytest.mark.parametrize("s", [1 / 400, 3.0, 400.0])
def test_the_mask_is_the_sigmoid_of_slope_times_embedding(s: float) -> None:
    e = [-3.0, -0.5, 0.0, 0.001, 2.0]
    expected = [1 / (1 + math.exp(-s * x)) if s * x > -700 else 0.0 for x in e]
    torch.testing.assert_close(Gate.apply(torch.tensor(e), s, S_MAX), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("s", [1 / 400, 3.0, 400.0])
def test_the_gradient_is_that_of_an_unannealed_gate_times_s_max_at_any_slope(s: float) -> None:
    e = torch.linspace(-4, 4, 17)
    weight = torch.linspace(-2, 3, 17)
    soft = [1 / (1 + math.exp(-x)) for x in e.tolist()]
    expected = [w * S_MAX * m * (1 - m) for w, m in zip(weight.tolist(), soft, strict=True)]
    torch.testing.assert_close(gradient(e, s, weight), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", [0.1, 1.0, 2.5, 10.0])
def test_the_gradient_is_autograds_with_the_compensation_of_hat(s: float) -> None:
    e = torch.linspace(-4, 4, 41, dtype=torch.float64)
    e = e[(s * e).abs() < 10]
    assert len(e) > 5
    leaf = e.clone().requires_grad_()
    (plain,) = torch.autograd.grad(torch.sigmoid(s * leaf).sum(), leaf)
    compensated = plain * (S_MAX / s) * (torch.cosh(s * e) + 1) / (torch.cosh(e) + 1)
    torch.testing.assert_close(gradient(e.float(), s).double(), compensated, rtol=1e-5, atol=1e-8)


def test_the_gradient_lives_where_autograds_is_rounded_away() -> None:
    e = torch.tensor([0.5])
    leaf = e.clone().requires_grad_()
    (plain,) = torch.autograd.grad(torch.sigmoid(400 * leaf).sum(), leaf)
    assert plain.item() == 0.0
    assert gradient(e, 400.0).item() == pytest.approx(400 * math.exp(-0.5) / (1 + math.exp(-0.5)) ** 2)


def test_at_the_limit_only_the_way_back_has_a_gradient() -> None:
    e = torch.tensor([LIMIT, LIMIT, -LIMIT, -LIMIT, LIMIT + 1, LIMIT - 1e-3])
    # A descent step goes against the gradient: a negative one pushes up.
    weight = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    found = gradient(e, 400.0, weight)
    assert [value == 0 for value in found.tolist()] == [True, False, True, False, True, False]
    assert found[1] > 0 > found[3]


def test_embeddings_beyond_the_limit_act_as_if_clamped() -> None:
    e = torch.tensor([LIMIT + 3, -LIMIT - 3])
    torch.testing.assert_close(Gate.apply(e, 0.5, S_MAX), torch.sigmoid(torch.tensor([3.0, -3.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_of_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    e = torch.tensor([5.5, -5.5, 0.25], dtype=dtype, requires_grad=True)
    mask = Gate.apply(e, 2.0, S_MAX)
    assert mask.dtype is torch.float32
    torch.testing.assert_close(mask, torch.sigmoid(2.0 * e.detach().float()))
    assert mask[0] < 1  # bfloat16 rounds it to 1
    (found,) = torch.autograd.grad(mask.sum(), e)
    soft = torch.sigmoid(e.detach().float())
    torch.testing.assert_close(found.float(), S_MAX * soft * (1 - soft), rtol=1e-2, atol=0.0)


def test_a_binary_mask_is_open_above_zero_only() -> None:
    found = binary(torch.tensor([-1e-8, 0.0, 1e-8, 3.0], dtype=torch.float32))
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert found.dtype is torch.float32


def test_sparsity_is_the_mean_use_of_free_units_over_all_gates() -> None:
    # Free units: 2 of the first gate, 3 of the second. Their use: (0.5 + 0.25) + (1 + 0 + 0.25) = 2; 2 / 5 = 0.4.
    masks = [
        (torch.tensor([0.5, 0.9, 0.25]), torch.tensor([0.0, 1.0, 0.0])),
        (torch.tensor([1.0, 0.0, 0.25, 0.7]), torch.tensor([0.0, 0.0, 0.0, 1.0])),
    ]
    assert sparsity(masks).item() == pytest.approx(0.4)


def test_used_units_cost_nothing_and_free_ones_all_the_same() -> None:
    mask = torch.tensor([0.2, 0.8, 0.5, 0.9], requires_grad=True)
    used = torch.tensor([1.0, 0.0, 1.0, 0.0])
    (found,) = torch.autograd.grad(sparsity([(mask, used)]), mask)
    assert found.tolist() == [0.0, 0.5, 0.0, 0.5]


def test_sparsity_is_zero_where_nothing_is_free() -> None:
    assert sparsity([(torch.ones(3), torch.ones(3))]).item() == 0.0
