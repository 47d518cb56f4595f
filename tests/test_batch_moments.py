"""The moments of a batch, however it is cut into pieces and copied: few pixels, large means, scratch memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import channels_first, eps_of, inverse_root_by_iteration
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.nn._fused_passes.geometry import geometry_of
from wellcond.nn._fused_passes.products import sum_of_products
from wellcond.nn._fused_passes.samples import Samples

pytestmark = pytest.mark.filterwarnings("ignore:.*values per channel give a covariance of rank:UserWarning")


@pytest.mark.parametrize(
    "shape", [(7, 12, 1, 1), (9, 40, 3, 3), (5, 300, 4, 4), (700, 64, 4, 4), (37, 80, 7, 7), (220, 64, 7, 7)]
)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("ratio", [0.0, 50.0])
def test_many_images_of_few_pixels_are_whitened_by_the_definition(shape, groups, ratio):
    """They are put side by side, and from 256 channels on half of the symmetric product is left out."""
    x = (torch.randn(shape, dtype=torch.float64) + ratio).requires_grad_()
    g = torch.randn(shape, dtype=torch.float64)
    layer = DecorrelatedBatchNorm2d(shape[1], groups=groups, eps=1e-2, dtype=torch.float64)
    X = channels_first(x)
    parts = []
    for rows in (X - X.mean(1, keepdim=True)).chunk(groups):
        P = rows @ rows.T / rows.shape[1]
        parts.append(inverse_root_by_iteration(P + 1e-2 * torch.eye(len(P), dtype=P.dtype)) @ rows)
    want = torch.cat(parts).view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    y = layer(x)
    # κ(P + εI) < 1e4: output within eps·κ, gradient within eps·κ^(3/2), and the rounding of the mean times the ratio.
    assert (y - want).abs().max() < 1e4 * 2.2e-16 * max(1.0, ratio)
    (got,), (expected,) = torch.autograd.grad(y, x, g), torch.autograd.grad(want, x, g)
    assert (got - expected).abs().max() < 1e6 * 2.2e-16 * max(1.0, ratio)


def test_pieces_may_be_read_through_another_slot():
    """As the one operand after they were both: they must not then share memory with the other."""
    X, Y = torch.randn(2, 5, 3, 20, dtype=torch.float64)
    ones, zeros = (f(1, 3, 1, dtype=torch.float64) for f in (torch.ones, torch.zeros))
    geometry = dataclasses.replace(geometry_of(X, 1), small=False)  # which would be read at once
    features = Samples(X, geometry, ones)
    centred = X - 1
    assert torch.allclose(sum_of_products(features, features), (centred @ centred.mT).sum(0))
    other = Samples(Y, geometry, zeros)
    for _ in range(2):  # each of them is read through both slots, one after the other
        assert torch.allclose(sum_of_products(other, features), (Y @ centred.mT).sum(0))
        assert torch.allclose(sum_of_products(features, other), (centred @ Y.mT).sum(0))


@pytest.mark.parametrize("joined", [False, True])
def test_a_copy_is_read_again_unless_another_has_taken_its_memory(joined):
    X, Y = torch.randn(2, 5, 60, 20, dtype=torch.float64)
    ones = torch.ones(1, 60, 1, dtype=torch.float64)
    found = geometry_of(X, 1)
    piece = found.pieces[0]._replace(joined=joined)
    geometry = dataclasses.replace(found, small=False, at_once=False, pieces=(piece,))

    def copy_of(x):
        return (x - 1).transpose(0, 1).flatten(1)[None] if joined else x - 1

    features, before = Samples(X, geometry, ones), copy_of(X)
    assert torch.equal(features.read(piece), before)
    X.mul_(2)  # seen by a new copy only
    assert torch.equal(features.read(piece), before)
    other = Samples(Y, geometry, ones)
    assert torch.equal(other.read(piece), copy_of(Y))
    assert torch.equal(features.read(piece), copy_of(X))


@pytest.mark.parametrize(
    "shape", [(8, 16, 8, 8), (100, 64, 7, 7), (3000, 64, 7, 7), (400_000, 8, 2, 2), (32, 16, 32, 32)]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 3.0, 30.0, 1e4])
def test_the_moments_in_single_precision(shape, groups, ratio):
    """Small, joined in one piece and in several, two pixels by two, and large: the mean to its last digit, unless the
    batch is small, and the covariance as far as the sum of 8192 numbers, the samples of a joined piece."""
    layer = DecorrelatedBatchNorm2d(shape[1], groups=groups, momentum=1.0)
    x = torch.randn(shape) + ratio
    layer(x)
    X = channels_first(x.double())
    mean, eps = X.mean(1), eps_of(torch.float32)
    ulp = eps * (mean.abs() + 1.0)
    assert ((layer.running_mean - mean).abs() <= (2 if x.numel() <= 1 << 15 else 1) * ulp).all()
    for rows, got in zip(X.chunk(groups), layer.running_cov, strict=True):
        truth = torch.cov(rows)
        # A random walk of roundings, eps/2 each; that of the mean is a shift of the origin, which does not matter.
        assert (got - truth).abs().max() <= 8192**0.5 * eps / 2 * truth.diagonal().max()
