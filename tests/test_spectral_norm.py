"""SN: the largest singular value of the flattened weight is exactly 1, eq. (11)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from treatment_models import LAYERS, matrices, polar_reference
from wellcond.linalg import NonFiniteMatrixError
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import OrthogonalLoss, orthogonal_weight, spectral_norm, treat
from wellcond.orthogonality._unit_norm import _composed, of_unit_norm

EPS = torch.finfo(torch.float32).eps


def largest(layer: nn.Module) -> float:
    return max(np.linalg.norm(W, 2) for W, _ in matrices(layer, layer.weight))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_is_its_weight_over_the_largest_singular_value(kind):
    """The groups of a convolution are blocks of one block-diagonal matrix and share its norm."""
    layer = LAYERS[kind]()
    before, parameter = layer.weight.detach().clone(), layer.weight
    sigma = largest(layer)
    assert spectral_norm(layer) is layer
    assert layer.parametrizations.weight.original is parameter
    assert torch.equal(parameter, before)
    # The square of σ_max is an eigenvalue of the Gram matrix, known to eps·(its size) relative to itself.
    assert largest(layer) == pytest.approx(1, rel=20 * EPS)
    assert torch.allclose(layer.weight.double() * sigma, before.double(), rtol=20 * EPS, atol=0)
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter))
    assert largest(layer) == pytest.approx(1, rel=20 * EPS)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_gradients_are_exact(shape):
    layer = spectral_norm(nn.Linear(shape[1], shape[0], bias=False).double())

    def value(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer.parametrizations.weight, {"original": weight}, ())

    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, weight)
    reference = weight / torch.linalg.matrix_norm(weight, 2)
    assert torch.allclose(value(weight), reference, rtol=1e-12)


def test_training_and_evaluation_agree_and_scale_does_not_matter():
    layer = spectral_norm(nn.Conv2d(3, 8, 3))
    x = torch.randn(2, 3, 5, 5)
    trained = layer.train()(x)
    with torch.no_grad():
        assert torch.equal(trained, layer.eval()(x))
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(4.0)  # a power of two, so not even rounding differs
    assert torch.equal(layer.weight, weight)


def test_a_zero_weight_stays_zero():
    layer = nn.Linear(3, 4)
    layer.weight.data.zero_()
    assert torch.equal(spectral_norm(layer).weight, torch.zeros(4, 3))


def test_of_an_orthogonal_weight_it_is_the_identity():
    layer = orthogonal_weight(nn.Linear(6, 4))
    weight = layer.weight.detach().clone()
    assert (spectral_norm(layer).weight - weight).abs().max() <= 20 * EPS
    value = torch.randn(4, 6)
    layer.weight = value  # goes through both
    assert (layer.weight - polar_reference(nn.Linear(6, 4), value)).abs().max() <= 50 * EPS


def test_autocast_and_half_precision_compute_in_float32():
    layer = spectral_norm(nn.Linear(64, 48))
    weight = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, weight)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert largest(layer) == pytest.approx(1, rel=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 2, 3, 64])  # LAPACK makes NaN, any number or an error of it
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_layer(rows, value):
    model = nn.Sequential(nn.Conv2d(3, rows, 3), DecorrelatedBatchNorm2d(rows))
    treat(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), "sn")
    operator, plain = spectral_norm(nn.Conv2d(3, rows, 3), of="operator", input_size=6), nn.Conv2d(3, rows, 3)
    penalty = OrthogonalLoss({"stem": plain}, form="srip")
    for weight in (optimizer.param_groups[0]["params"][0], operator.parametrizations.weight.original, plain.weight):
        with torch.no_grad():
            weight[0, 0, 0, 0] = value
    with pytest.raises(
        NonFiniteMatrixError, match=r"spectral norm of layer '0' \(Conv2d\): the weight holds NaN or inf"
    ):
        model(torch.randn(4, 3, 6, 6))
    with pytest.raises(NonFiniteMatrixError, match="the weight holds NaN or infinite entries"):
        operator(torch.randn(4, 3, 6, 6))
    with pytest.raises(NonFiniteMatrixError, match=r"orthogonal loss of layer 'stem' \(Conv2d\): the weight holds"):
        penalty()


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match=r"layer '' \(LayerNorm\) has a weight of shape \(3,\)"):
        spectral_norm(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"spectral norm of layer '' .* is already on"):
        spectral_norm(spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="already has the parametrisation _Orthogonal"):
        spectral_norm(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)))


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 3, 5), (3, 4, 4)])
def test_all_its_derivatives_on_both_ways_are_those_of_the_composed_formula(shape, by_products, monkeypatch):
    """Of one matrix and of several, which share the norm of the largest; also where two of them tie."""
    if by_products:
        monkeypatch.setattr("wellcond.orthogonality._unit_norm.decomposes", lambda _: False)
    W = torch.randn(*shape, dtype=torch.float64)
    if len(W) > 1:
        W[1] = W[0] = 2 * W[0]
    W.requires_grad_()
    G = torch.randn(*shape, dtype=torch.float64)

    def derivatives(function):
        Y = function(W)
        (first,) = torch.autograd.grad(Y, W, G, create_graph=True)
        return Y, first, *torch.autograd.grad(first.square().sum(), W)

    for own, truth in zip(derivatives(of_unit_norm), derivatives(_composed), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-9, atol=1e-11)
