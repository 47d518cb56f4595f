"""NOG on an orthogonal weight turns it by no more than its gradient would: the length of the gradient is kept there."""

import pytest
import torch
from torch import nn

from treatment_models import gaussian
from wellcond.orthogonality import NearestOrthogonalGradient, orthogonal_weight, treat


def stepped(scale: str, *, on: str = "gradient", orthogonal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the stored tensor, and its move at rate 1."""
    layer = nn.Linear(3, 7, bias=False)
    if orthogonal:
        orthogonal_weight(layer)
    stored = layer.parametrizations.weight.original if orthogonal else layer.weight
    optimizer = torch.optim.SGD([stored], lr=1.0)
    NearestOrthogonalGradient(optimizer, layer, scale=scale, on=on)
    (layer.weight * gaussian(7, 3, seed=1).float()).sum().mul(5.0).backward()
    start, gradient = stored.detach().clone(), stored.grad.clone()
    optimizer.step()
    return gradient, start - stored.detach()


@pytest.mark.parametrize("on", ["gradient", "update"])
@pytest.mark.parametrize("scale", ["auto", "gradient", "paper"])
def test_the_length_is_that_of_the_gradient_and_the_direction_the_polar_factor(scale, on):
    torch.manual_seed(0)
    gradient, move = stepped(scale, on=on)
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    length = 1.0 if scale == "paper" else S.norm() / 3**0.5
    torch.testing.assert_close(move.double(), length * U @ Vh, rtol=0, atol=1e-4)


def test_a_plain_weight_is_treated_as_in_the_paper():
    torch.manual_seed(0)
    gradient, move = stepped("auto", orthogonal=False)
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    torch.testing.assert_close(move.double(), U @ Vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("treatments", ["nog+ow", "nog+ow+olr"])
def test_a_step_turns_the_weight_no_more_than_without_it(treatments):
    """The rotation per step of ``ow`` alone, from the same start and batches, at the rate of the paper."""
    turned = {}
    for name in ("ow", treatments):
        torch.manual_seed(0)
        layer, data = nn.Conv2d(3, 16, 3), torch.randn(6, 8, 3, 8, 8)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        treat(layer, optimizer, name, layers=[layer])
        moves = []
        for x in data:
            start = layer.weight.detach().clone()
            optimizer.zero_grad()
            layer(x).tanh().square().mean().backward()
            optimizer.step()
            moves.append(((layer.weight.detach() - start).norm() / start.norm()).item())
        turned[name] = sum(moves)
    assert 0 < turned[treatments] < 2 * turned["ow"]


def test_a_zero_and_a_huge_gradient_are_left_and_kept():
    layer = orthogonal_weight(nn.Linear(3, 7, bias=False))
    stored = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD([stored], lr=1.0)
    NearestOrthogonalGradient(optimizer, layer)
    stored.grad = torch.zeros_like(stored)
    optimizer.step()
    assert torch.equal(stored.grad, torch.zeros_like(stored))
    stored.grad = 1e30 * torch.randn_like(stored)
    size = (stored.grad / 1e30).norm()
    optimizer.step()
    torch.testing.assert_close((stored.grad / 1e30).norm(), size, rtol=1e-4, atol=0)
