"""OL: the three forms of the orthogonal loss, eq. (12), on the smaller Gram side of every kind of weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from treatment_models import LAYERS, matrices, orthogonality_gap
from wellcond.orthogonality import OrthogonalLoss, orthogonal_weight, treat

FORMS = {
    "soft": lambda W: np.linalg.norm(small_gap(W)),
    # ‖WᵀW − I‖² + ‖WWᵀ − I‖² over both sides, less the part of the larger that no weight can remove.
    "double_soft": lambda W: (
        np.linalg.norm(W.T @ W - np.eye(W.shape[1])) ** 2
        + np.linalg.norm(W @ W.T - np.eye(W.shape[0])) ** 2
        - abs(W.shape[0] - W.shape[1])
    ),
    "srip": lambda W: np.abs(np.linalg.svd(W, compute_uv=False) ** 2 - 1).max(),
}


def small_gap(W: np.ndarray) -> np.ndarray:
    return W.T @ W - np.eye(W.shape[1]) if W.shape[0] >= W.shape[1] else W @ W.T - np.eye(W.shape[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_equals_the_sum_over_its_matrices(kind, form):
    layer = LAYERS[kind]().double()
    expected = sum(FORMS[form](W) for W, _ in matrices(layer, layer.weight))
    assert OrthogonalLoss(layer, form=form)().item() == pytest.approx(expected, rel=1e-12, abs=1e-10)


def test_layers_add_up_and_the_coefficient_multiplies():
    layers = {"a": nn.Linear(5, 3), "b": nn.Conv2d(3, 16, 3)}
    parts = [OrthogonalLoss(layer)() for layer in layers.values()]
    for given in (layers, list(layers.values()), iter(layers.values())):
        assert torch.allclose(OrthogonalLoss(given, coefficient=0.3)(), 0.3 * sum(parts))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_gradients_are_exact(form, shape):
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    loss = OrthogonalLoss(layer, form=form)

    def value(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Term(layer, loss), {"layer.weight": weight}, ())

    assert torch.autograd.gradcheck(value, torch.randn(shape, dtype=torch.float64, requires_grad=True))


class _Term(nn.Module):
    def __init__(self, layer: nn.Module, loss: OrthogonalLoss) -> None:
        super().__init__()
        self.layer, self.loss = layer, loss

    def forward(self) -> torch.Tensor:
        return self.loss()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_at_an_orthogonal_weight_the_gradient_is_zero_and_not_nan(form, shape):
    """At a signed permutation the gap is exactly zero, where the norms have their kink."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = torch.eye(*shape).flip(0) * -1.0
    loss = OrthogonalLoss(layer, form=form)()
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(layer.weight.grad, torch.zeros(shape))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 2), (8, 3), (64, 27), (27, 64), (128, 128)])
def test_orthogonal_up_to_rounding_is_orthogonal(form, dtype, shape):
    """The subgradient zero, not the direction of the rounding, which has length 2 whatever its size."""
    for seed in range(10):
        W = torch.nn.init.orthogonal_(torch.empty(shape, dtype=dtype), generator=torch.Generator().manual_seed(seed))
        layer = nn.Linear(*reversed(shape), bias=False, dtype=dtype)
        layer.weight.data.copy_(W)
        OrthogonalLoss(layer, form=form)().backward()
        assert layer.weight.grad.abs().max() == 0.0
        # What is no rounding has the whole gradient.
        layer.weight.data.mul_(1 + 100 * max(shape) * torch.finfo(dtype).eps)
        layer.zero_grad()
        OrthogonalLoss(layer, form=form)().backward()
        assert layer.weight.grad.norm() > (1.0 if form != "double_soft" else 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_descending_it_makes_the_weight_orthogonal(form):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 16, 3)
    penalty = OrthogonalLoss(layer, form=form)
    # SRIP moves one singular value at a time, so it needs longer steps to move all 16.
    optimizer = torch.optim.SGD([layer.weight], lr=0.2 if form == "srip" else 0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    before = orthogonality_gap(layer)
    for _ in range(400):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
        schedule.step()
    assert orthogonality_gap(layer) < 1e-2 < before


def test_its_gradient_counts_a_weight_that_layers_share_once():
    """Added to the gradients, as callbacks do, or as a term of the loss: the same."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    treatment = treat(model, optimizer, "ol", layers=["0", "1"])
    treatment.loss().backward()
    expected, model[0].weight.grad = model[0].weight.grad, None
    treatment.add_loss_gradient()
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_it_is_of_the_weight_in_use():
    layer = orthogonal_weight(nn.Linear(6, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3).add_(torch.randn(4, 6))
    assert OrthogonalLoss(layer)() < 1e-5


def test_autocast_and_half_precision_do_not_lose_it():
    layer = nn.Linear(64, 32)
    nn.init.orthogonal_(layer.weight)
    penalty = OrthogonalLoss(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty()
    assert value.dtype == torch.float32
    assert torch.equal(value, penalty())
    half = nn.Linear(64, 32).to(torch.bfloat16)
    expected = OrthogonalLoss(nn.Linear(64, 32))
    expected.targets[0].parameter.data = half.weight.detach().float()
    assert torch.equal(OrthogonalLoss(half)(), expected())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"unknown form of the orthogonal loss 'sript'; did you mean 'srip'"):
        OrthogonalLoss(nn.Linear(2, 2), form="sript")
    with pytest.raises(ValueError, match=r"coefficient .* got -1"):
        OrthogonalLoss(nn.Linear(2, 2), coefficient=-1)
    with pytest.raises(ValueError, match=r"coefficient .* got nan"):
        OrthogonalLoss(nn.Linear(2, 2), coefficient=float("nan"))
    with pytest.raises(ValueError, match=r"layer 'norm' \(LayerNorm\) has a weight of shape \(3,\)"):
        OrthogonalLoss({"norm": nn.LayerNorm(3)})
