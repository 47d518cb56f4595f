"""Layers on ``meta``: people count operations, initialise large models and look at shapes there, as with torch.nn."""

from __future__ import annotations

import pytest
import torch

from wellcond import nn as spectral

IMAGES = (4, 16, 7, 7)
CASES = {
    "DecorrelatedBatchNorm1d": (lambda: spectral.DecorrelatedBatchNorm1d(16), (32, 16), (32, 16)),
    "DecorrelatedBatchNorm2d": (lambda: spectral.DecorrelatedBatchNorm2d(16, groups=4), IMAGES, IMAGES),
    "DecorrelatedBatchNorm3d": (lambda: spectral.DecorrelatedBatchNorm3d(4), (2, 4, 3, 4, 5), (2, 4, 3, 4, 5)),
    "IterNorm2d": (lambda: spectral.IterNorm2d(16), IMAGES, IMAGES),
    "cholesky": (lambda: spectral.DecorrelatedBatchNorm2d(16, method="cholesky"), IMAGES, IMAGES),
    "pca": (lambda: spectral.DecorrelatedBatchNorm2d(16, method="pca"), IMAGES, IMAGES),
    "relative": (lambda: spectral.DecorrelatedBatchNorm2d(16, relative=True), IMAGES, IMAGES),
    "GlobalCovariancePool2d": (lambda: spectral.GlobalCovariancePool2d(16), IMAGES, (4, 136)),
    "reduced": (lambda: spectral.GlobalCovariancePool2d(16, reduction=4, isometric=True), IMAGES, (4, 10)),
    "log": (lambda: spectral.GlobalCovariancePool2d(16, function="log", eps=1e-3, triu=False), IMAGES, (4, 16, 16)),
    "TokenCovariancePool": (lambda: spectral.TokenCovariancePool(16), (4, 49, 16), (4, 136)),
    "SpectralLayer": (lambda: spectral.SpectralLayer("sqrt", normalisation="trace"), (4, 16, 49), (4, 16, 16)),
    "SkewOrthogonalConv2d": (lambda: spectral.SkewOrthogonalConv2d(16, 16), IMAGES, (4, 16, 7, 7)),
    "SubspaceLayer": (lambda: spectral.SubspaceLayer(6, 64), (4, 6), (4, 64)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_made_on_meta_gives_shapes_and_gradients_of_shapes(name, train):
    build, taken, given = CASES[name]
    with torch.device("meta"):
        layer = build().train(train)
        x = torch.empty(taken, requires_grad=True)
    y = layer(x)
    assert y.is_meta
    assert y.shape == given
    inputs = (x, *layer.parameters())
    grads = torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
    assert all(g is not None and g.is_meta and g.shape == t.shape for g, t in zip(grads, inputs, strict=True))
