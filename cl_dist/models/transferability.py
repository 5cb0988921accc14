"""LogME: how well features predict labels by a linear map, without training one.

Axes: N rows, H features, K classes, R rank.
Source: You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML, algorithm 1.
Departs from it: features and one-hot labels are centred, which stands for a bias that is not regularised, and the
evidence is that of the N - 1 contrasts between rows, since the mean of a target is used up by that bias.
"""

import torch
from torch import Tensor

ROUNDS, TOLERANCE = 50, 1e-4


def logme(features_NH: Tensor, labels_N: Tensor) -> float:
    """Return the logarithm of the maximum evidence per row and class of a Bayesian linear model: higher is better.

    y = F w + noise with w ~ N(0, 1/alpha) and noise ~ N(0, 1/beta) for each class; alpha and beta maximise the evidence
    by MacKay's fixed point. Computed in float64 on the CPU, so that it depends on no number of threads or device beyond
    the features themselves.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if len(features_NH) < 2:
        raise ValueError(f"logme: {len(features_NH)} rows; expected at least 2")
    features_NH = features_NH.detach().cpu().double()
    features_NH = features_NH - features_NH.mean(0)
    left_NR, scale_R, _ = torch.linalg.svd(features_NH, full_matrices=False)
    square_R = scale_R**2
    classes = labels_N.unique()
    evidence = [
        _evidence((labels_N == each).cpu().double(), left_NR, square_R, features_NH.shape[1]) for each in classes
    ]
    return sum(evidence) / len(classes)


def _evidence(target_N: Tensor, left_NR: Tensor, square_R: Tensor, width: int) -> float:
    """Return the maximum log evidence per row for one target."""
    target_N = target_N - target_N.mean()
    num = len(target_N) - 1
    along_R = (left_NR.T @ target_N) ** 2
    outside = (target_N**2).sum() - along_R.sum()  # what no linear map of the features explains
    alpha = beta = torch.ones((), dtype=torch.float64)
    for _ in range(ROUNDS):
        ratio = alpha / beta
        gamma = (square_R / (square_R + ratio)).sum()
        weight = (square_R * along_R / (square_R + ratio) ** 2).sum()
        residual = (along_R * (ratio / (square_R + ratio)) ** 2).sum() + outside.clamp(min=0)
        alpha = (gamma / (weight + 1e-12)).clamp(1e-9, 1e9)
        beta = ((num - gamma) / (residual + 1e-12)).clamp(1e-9, 1e9)
        if abs(alpha / beta - ratio) <= TOLERANCE * ratio:
            break
    logdet = torch.log(alpha + beta * square_R).sum() + (width - len(square_R)) * torch.log(alpha)
    fit = num * torch.log(beta) + width * torch.log(alpha) - logdet - beta * residual - alpha * weight
    return float(fit - num * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))) / (2 * num)
