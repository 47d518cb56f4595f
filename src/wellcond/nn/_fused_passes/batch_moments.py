"""The moments of a batch, accurate for any mean, and the extreme values that reveal special cases.

Σ x xᵀ − M μ μᵀ loses as many digits as 1 + (μ/σ)² has. On the CPU the variances are read, and x is centred before the
product only if that is too many, or where it is copied anyway or so small that a copy costs less than the check.
Elsewhere nothing is read and x is always centred, by a mean that Welford's updates keep exact for constant channels
(Chan, Golub and LeVeque, The American Statistician, 1983).
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry
from .products import sum_of_products
from .samples import Samples

# The largest (μ/σ)² whose loss is accepted.
HARMLESS_RATIO = 4.0
# The same for samples centred by a rounded mean.
HARMLESS_RATIO_CENTRED = 1e4
# Number of samples for a first estimate of it; the covariance shows afterwards whether that was right.
SAMPLED = 256


class Numbers(NamedTuple):
    """The smallest and the largest variance of a channel, and the largest |mean|; NaN where there is one."""

    lowest: float
    highest: float
    mean: float


class Moments(NamedTuple):
    """The moments of activations in G groups of d channels.

    Attributes:
        mean, cov: (G, d, 1) and (G, d, d), divided by the number of samples; both zero for none.
        away: the mean of the samples as they are read, or None for 0.
        numbers: the values that were read, None if none.
        samples: the activations, to be read minus a suitable origin.
    """

    mean: Tensor
    cov: Tensor
    away: Tensor | None
    numbers: Numbers | None
    samples: Samples


def measure(x: Tensor, geometry: Geometry, *, reading: bool) -> Moments:
    """The moments of (N, C, *spatial), with their numbers if values may be read."""
    if not geometry.pieces:
        _, G, d, _ = geometry.sizes
        zero = x.new_zeros(G, d, 1, dtype=geometry.dtype)
        return Moments(zero, zero @ zero.mT, zero, None, Samples(x, geometry))
    if not geometry.on_cpu:
        return _centred_elsewhere(x, geometry, reading=reading)
    samples = Samples(x, geometry)
    mean = samples.mean()
    if geometry.small or geometry.pieces[0].joined:
        found = _about(mean, None, x, geometry, reading=reading)
        if not _cancels(found, HARMLESS_RATIO_CENTRED if geometry.small else HARMLESS_RATIO):
            return found
        if not geometry.small:
            found = _corrected(found, reading=reading)
            if not _cancels(found, HARMLESS_RATIO_CENTRED):
                return found
    elif not _cancels_at_first(mean, samples.blocks):
        cov = sum_of_products(samples, samples)
        cov.baddbmm_(mean, mean.mT, beta=1 / geometry.count, alpha=-1)
        found = Moments(mean, cov, mean, _numbers(mean, cov) if reading else None, samples)
        if not _cancels(found, HARMLESS_RATIO):
            return found
    # The sum of many values of one sign is rounded; that of the differences hardly is.
    return _about(mean + Samples(x, geometry, mean).mean(), None, x, geometry, reading=reading)


def _centred_elsewhere(x: Tensor, geometry: Geometry, *, reading: bool) -> Moments:
    samples = Samples(x, geometry)
    if x.dtype == geometry.dtype:
        mean = torch.var_mean(samples.blocks, (0, 3), correction=0)[1].unsqueeze(-1)
        return _about(mean, None, x, geometry, reading=reading)
    # Of half precision, var_mean returns a mean in half precision.
    origin = samples.mean()
    return _about(origin, Samples(x, geometry, origin).mean(), x, geometry, reading=reading)


def _about(origin: Tensor, away: Tensor | None, x: Tensor, geometry: Geometry, *, reading: bool) -> Moments:
    """The moments computed from x − origin, whose mean is ``away`` (None for 0)."""
    samples = Samples(x, geometry, origin)
    cov, mean = sum_of_products(samples, samples, 1 / geometry.count), origin
    if away is not None:
        cov.baddbmm_(away, away.mT, alpha=-1)
        mean = origin + away
    return Moments(mean, cov, away, _numbers(mean, cov) if reading else None, samples)


def _corrected(found: Moments, *, reading: bool) -> Moments:
    """The same moments with the mean of the samples about their origin, which is the rounding of the first mean."""
    samples, away = found.samples, found.samples.mean()
    cov = torch.baddbmm(found.cov, away, away.mT, alpha=-1)
    mean = found.mean + away
    return Moments(mean, cov, away, _numbers(mean, cov) if reading else None, samples)


def _numbers(mean: Tensor, cov: Tensor) -> Numbers:
    lowest, highest = torch.aminmax(cov.diagonal(dim1=-2, dim2=-1))
    least, most = torch.aminmax(mean)
    return Numbers(lowest.item(), highest.item(), max(most.item(), -least.item()))


def _cancels_at_first(mean: Tensor, blocks: Tensor) -> bool:
    """An estimate of :func:`_cancels` from the first samples."""
    first = blocks[:1, :, :, :SAMPLED]
    return _exceeds(mean, (first - mean).square_().mean((0, 3)), HARMLESS_RATIO)


def _cancels(moments: Moments, ratio: float) -> bool:
    """Whether (μ/σ)² of some channel is above the ratio, or a variance is too large for the dtype, as that of a rounded
    mean may be."""
    numbers = moments.numbers
    if numbers is not None:
        if not numbers.highest < inf:
            return True
        if numbers.mean * numbers.mean <= ratio * numbers.lowest:
            return False
    elif not moments.cov.diagonal(dim1=-2, dim2=-1).isfinite().all():
        return True
    return _exceeds(moments.mean, moments.cov.diagonal(dim1=-2, dim2=-1), ratio)


def _exceeds(mean: Tensor, variance: Tensor, ratio: float) -> bool:
    return bool((mean.squeeze(-1).square() > ratio * variance).any())
