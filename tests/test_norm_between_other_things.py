"""Decorrelated batch norm before in-place operations, under autocast, and with hooks, when differentiated twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond._shared.exact_products import exactly
from wellcond._shared.operator_norm import spectral_norm_bound
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d
from wellcond.orthogonality._unit_norm import of_unit_norm

LAYERS = {
    2: DecorrelatedBatchNorm1d,
    3: DecorrelatedBatchNorm1d,
    4: DecorrelatedBatchNorm2d,
    5: DecorrelatedBatchNorm3d,
}
SHAPES = (32, 4), (8, 4, 9), (4, 4, 6, 6), (8, 8, 80, 80), (2, 4, 3, 4, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_in_place_operation_may_follow(shape, last, training):
    x = torch.randn(shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    layer = LAYERS[len(shape)](shape[1]).train(training)
    gradients = []
    for inplace in (False, True):
        own = x.detach().requires_grad_()
        y = nn.ReLU(inplace)(layer(own))
        assert y.stride() == x.stride()
        y.square().sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("hooked", ["x", "weight"])
def test_hooks_run_once_where_the_gradient_is_differentiated_again(hooked):
    torch.manual_seed(0)
    images = torch.randn(4, 4, 6, 6)
    found = []
    for create_graph in (False, True):
        x, layer = images.clone().requires_grad_(), DecorrelatedBatchNorm2d(4)
        tensor = x if hooked == "x" else layer.weight
        tensor.register_hook(lambda gradient: 2 * gradient)
        (gradient,) = torch.autograd.grad((layer(x) ** 3).sum(), tensor, create_graph=create_graph)
        found.append(gradient.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_gradient_within_autocast_can_be_differentiated_again():
    torch.manual_seed(0)
    layer, images, found = DecorrelatedBatchNorm2d(4), torch.randn(4, 4, 6, 6), []
    for enabled in (False, True):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (gradient,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
        found.append(gradient.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("function", [spectral_norm_bound, of_unit_norm, lambda A: exactly(lambda X: X @ X.mT, A)])
def test_hooks_of_a_weight_run_once_too(function, monkeypatch):
    monkeypatch.setattr("wellcond._shared.exact_products.products_are_rounded", lambda: True)
    torch.manual_seed(0)
    weight, found = torch.randn(*((1,) if function is of_unit_norm else ()), 5, 7), []
    for create_graph in (False, True):
        A = weight.clone().requires_grad_()
        A.register_hook(lambda gradient: 2 * gradient)
        (gradient,) = torch.autograd.grad((function(A) ** 3).sum(), A, create_graph=create_graph)
        found.append(gradient.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_weight_without_a_bias_counts_in_training_and_evaluation():
    layer = DecorrelatedBatchNorm2d(4, eps=1e-8)
    layer.bias = None
    torch.nn.init.constant_(layer.weight, 2.0)
    x = torch.randn(64, 4, 6, 6)
    for _ in range(200):
        layer(x)
    for mode in (True, False):
        assert abs(layer.train(mode)(x).std().item() - 2.0) < 0.01


@pytest.mark.parametrize("options", [{}, {"method": "cholesky"}, {"relative": True}], ids=str)
def test_running_statistics_that_require_gradients_are_tracked_outside_of_the_graph(options):
    """As those that were made from parameters, or for a gradient of the evaluation."""
    layer = DecorrelatedBatchNorm2d(4, **options)
    layer.running_mean.requires_grad_()
    layer.running_cov.requires_grad_()
    x = torch.randn(16, 4, 5, 5)
    layer(x)
    other = DecorrelatedBatchNorm2d(4, **options)
    other(x)
    assert torch.equal(layer.running_mean, other.running_mean) and layer.running_mean.is_leaf
    assert torch.equal(layer.running_cov, other.running_cov) and layer.running_cov.is_leaf
