import math

import pytest
import torch
from torch import Tensor

from cl_dist.models.transferability import logme


def evidence(features_NH: Tensor, target_N: Tensor, alpha: float, beta: float) -> float:
    """The log density of the targets, as a Gaussian process with a linear kernel: no decomposition, no fixed point."""
    covariance = features_NH @ features_NH.T / alpha + torch.eye(len(target_N), dtype=torch.float64) / beta
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(target_N), covariance)
    return normal.log_prob(target_N).item()


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (12, 30)])
def test_it_is_the_maximum_of_the_evidence_over_both_precisions(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 0.7 * torch.randn(rows, generator=generator, dtype=torch.float64) > 0).long()
    start = torch.eye(rows, dtype=torch.float64)
    start[:, 0] = 1.0
    contrasts = torch.linalg.qr(start)[0][:, 1:].T  # orthogonal to the mean
    grid = [2.0 ** (power / 4) for power in range(-30, 60)]
    best = max(evidence(contrasts @ features, contrasts @ labels.double(), a, b) for a in grid for b in grid)
    found = logme(features, labels)  # two classes: their targets differ in sign only
    assert found == pytest.approx(best / (rows - 1), abs=3e-3)


def test_features_that_tell_the_labels_apart_score_higher_than_noise_and_than_fewer_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    noise = torch.randn(120, 16, generator=generator)
    useful = noise.clone()
    useful[torch.arange(120), labels] += 3.0
    weak = noise.clone()
    weak[torch.arange(120), labels] += 1.0
    found = [logme(features, labels) for features in (noise, weak, useful)]
    assert found == sorted(found)
    assert found[2] - found[0] > 0.3


def test_the_scale_and_the_place_of_features_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(50, 8, generator=generator), torch.randint(0, 2, (50,), generator=generator)
    assert logme(7.0 * features + 3.0, labels) == pytest.approx(logme(features, labels), abs=1e-3)


def test_half_precision_and_constant_features_give_a_number() -> None:
    labels = torch.tensor([0, 1] * 8)
    assert math.isfinite(logme(torch.ones(16, 4, dtype=torch.bfloat16), labels))
    with pytest.raises(ValueError, match="expected at least 2"):
        logme(torch.ones(1, 4), labels[:1])
