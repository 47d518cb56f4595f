"""The moments of a batch, accurate to rounding whatever its mean, and the few numbers that say what else there is to do.

Σ x xᵀ − M μ μᵀ loses the digits of 1 + (μ/σ)². On the CPU the variances are read, and x is centred before the product
only where that is much. Elsewhere nothing is read and x is always centred, by a mean that Welford's updates keep exact
for constant channels (Chan, Golub and LeVeque, The American Statistician, 1983).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pieces import SMALL, CentredPieces, mean_of_samples, sum_of_products

# Up to this (μ/σ)² the loss is left to rounding.
HARMLESS_RATIO = 4.0
# Samples from which that is guessed at first; the covariance itself shows afterwards whether the guess was right.
SAMPLED = 1024


class Numbers(NamedTuple):
    """The smallest and the largest variance of a channel, and the largest |mean|; NaN where there is one."""

    lowest: float
    highest: float
    mean: float


class Moments(NamedTuple):
    """Of (K, G, d, n) activations, G the groups.

    Attributes:
        mean, cov: (G, d, 1) and (G, d, d), divided by the number of samples; both zero for none.
        origin: (G, d, 1) that the activations are best read minus, or None.
        away: the mean of what is then read, or None for 0.
        numbers: what was read of them, None where that is not asked for.
        features: the activations, as they are best read.
    """

    mean: Tensor
    cov: Tensor
    origin: Tensor | None
    away: Tensor | None
    numbers: Numbers | None
    features: CentredPieces


def measure(blocks: Tensor, dtype: torch.dtype, *, reading: bool) -> Moments:
    """The moments of (K, G, d, n), in this dtype; with their numbers if values may be read."""
    if not blocks.numel():
        zero = blocks.new_zeros(*blocks.shape[1:3], 1, dtype=dtype)
        return Moments(zero, zero @ zero.mT, None, zero, None, CentredPieces(blocks, dtype))
    if blocks.device.type != "cpu":
        return _centred_elsewhere(blocks, dtype, reading=reading)
    features = CentredPieces(blocks, dtype)
    mean = mean_of_samples(features)
    # The product of a small batch costs less than the guess whether it will do.
    first = blocks[:1, :, :, :SAMPLED]
    if blocks.numel() <= SMALL or not _cancels(mean, (first - mean).square_().mean((0, 3))):
        cov = sum_of_products(features, features)
        cov.baddbmm_(mean, mean.mT, beta=1 / _samples(blocks), alpha=-1)
        numbers = _numbers(mean, cov) if reading else None
        harmless = numbers is not None and numbers.mean**2 <= HARMLESS_RATIO * numbers.lowest
        if harmless or not _cancels(mean, cov.diagonal(dim1=-2, dim2=-1)):
            return Moments(mean, cov, None, mean, numbers, features)
    # The sum of many values of one sign has rounded; that of the differences hardly does.
    mean = mean + mean_of_samples(CentredPieces(blocks, dtype, mean))
    return _about(mean, None, blocks, dtype, reading=reading)


def _centred_elsewhere(blocks: Tensor, dtype: torch.dtype, *, reading: bool) -> Moments:
    if blocks.dtype == dtype:
        mean = torch.var_mean(blocks, (0, 3), correction=0)[1].unsqueeze(-1)
        return _about(mean, None, blocks, dtype, reading=reading)
    # Those of half precision give their mean in it.
    origin = mean_of_samples(CentredPieces(blocks, dtype))
    away = mean_of_samples(CentredPieces(blocks, dtype, origin))
    return _about(origin, away, blocks, dtype, reading=reading)


def _about(origin: Tensor, away: Tensor | None, blocks: Tensor, dtype: torch.dtype, *, reading: bool) -> Moments:
    """The moments by way of x − origin, of which the mean is known."""
    features = CentredPieces(blocks, dtype, origin)
    cov, mean = sum_of_products(features, features, 1 / _samples(blocks)), origin
    if away is not None:
        cov.baddbmm_(away, away.mT, alpha=-1)
        mean = origin + away
    return Moments(mean, cov, origin, away, _numbers(mean, cov) if reading else None, features)


def _samples(blocks: Tensor) -> int:
    return blocks.shape[0] * blocks.shape[-1]


def _numbers(mean: Tensor, cov: Tensor) -> Numbers:
    lowest, highest = torch.aminmax(cov.diagonal(dim1=-2, dim2=-1))
    return Numbers(lowest.item(), highest.item(), torch.linalg.vector_norm(mean, float("inf")).item())


def _cancels(mean: Tensor, variance: Tensor) -> bool:
    """Whether Σ x xᵀ − M μ μᵀ loses digits in some channel, of this variance (G, d)."""
    return bool((mean.squeeze(-1).square() > HARMLESS_RATIO * variance).any())
