import math

import pytest
import torch

from cl_dist.models.noise import gumbel

ROWS = torch.tensor([3, 11, 4, 2**40, 0, 3])


def test_a_row_has_its_noise_in_any_position_and_company() -> None:
    whole = gumbel(1, 5, ROWS, num_plugins=3, num_tasks=2)
    order = torch.tensor([4, 0, 3, 1, 2])
    torch.testing.assert_close(gumbel(1, 5, ROWS[order], 3, 2), whole[:, order], rtol=0, atol=0)
    for place in range(len(ROWS)):
        alone = gumbel(1, 5, ROWS[place : place + 1], 3, 2)
        torch.testing.assert_close(alone, whole[:, place : place + 1], rtol=0, atol=0)
    torch.testing.assert_close(whole[:, 0], whole[:, 5], rtol=0, atol=0)


def test_more_tasks_or_plugins_leave_the_noise_of_the_others() -> None:
    small, large = gumbel(1, 5, ROWS, 2, 2), gumbel(1, 5, ROWS, 4, 7)
    torch.testing.assert_close(large[:2, :, :2], small, rtol=0, atol=0)


def test_torchs_generators_have_no_part_in_it() -> None:
    first = gumbel(1, 5, ROWS, 2, 2)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    torch.testing.assert_close(gumbel(1, 5, ROWS, 2, 2), first, rtol=0, atol=0)
    torch.set_rng_state(state)


@pytest.mark.parametrize(("seed", "step"), [(2, 5), (1, 6), (2**62, 5), (2, 4)])
def test_another_seed_or_step_has_other_noise(seed: int, step: int) -> None:
    first, second = gumbel(1, 5, ROWS, 2, 2), gumbel(seed, step, ROWS, 2, 2)
    assert not (first == second).any()


def test_rows_plugins_tasks_and_logits_all_differ() -> None:
    noise = gumbel(1, 5, torch.arange(50), num_plugins=24, num_tasks=19)
    assert noise.shape == (24, 50, 19, 2)
    assert len(noise.unique()) > 0.999 * noise.numel()  # float32 has collisions of its own


def test_it_is_standard_gumbel_and_finite() -> None:
    noise = gumbel(7, 3, torch.arange(5000), num_plugins=10, num_tasks=10).double()  # a million numbers
    assert noise.dtype is torch.float64
    assert torch.isfinite(noise).all()
    # The standard errors are 0.0013 and 0.0034 (the kurtosis of a Gumbel variable is 5.4).
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.006)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.016)
    for x in (-1.0, 0.0, 1.0, 3.0):  # P(G <= x) = exp(-exp(-x))
        assert (noise <= x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.0025)


def test_no_two_keys_go_together() -> None:
    noise = gumbel(7, 3, torch.arange(20000), num_plugins=2, num_tasks=3)
    next_step = gumbel(7, 4, torch.arange(20000), num_plugins=2, num_tasks=3)
    columns = torch.cat([part.permute(0, 2, 3, 1).flatten(0, 2) for part in (noise, next_step)])  # 24 series of rows
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.035  # 5 / sqrt(20000)
    next_row = torch.corrcoef(torch.stack([noise[0, :-1, 0, 0], noise[0, 1:, 0, 0]]))
    assert abs(next_row[0, 1]) < 0.035


def test_a_row_number_is_no_step() -> None:
    """Step and row are not interchangeable, as in noise keyed on their sum."""
    first = gumbel(1, 5, torch.tensor([6]), 2, 2)
    assert not (first == gumbel(1, 6, torch.tensor([5]), 2, 2)).any()
