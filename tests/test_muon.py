"""NOG in the place of Muon, with its scales and with any solver, against literal references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from treatment_models import gaussian, polar_reference
from wellcond.linalg import polar
from wellcond.orthogonality import NearestOrthogonalGradient

EPS = torch.finfo(torch.float32).eps


def offered(solver: str) -> bool:
    try:
        polar(torch.eye(2), solver=solver)
    except ValueError:
        return False
    return True


# How far the singular values of the step may be from 1. A Gaussian 64 × 27 matrix has κ below 10; Muon's own five steps
# leave any singular value between 0.68 and 1.14 (Jordan et al. 2024).
SOLVERS = {
    name: gap for name, gap in {"auto": 1e-4, "svd": 1e-4, "minimax": 1e-4, "muon": 0.33}.items() if offered(name)
}


def exact_polar(matrix: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


SCALES = {
    "paper": lambda rows, columns: 1.0,
    "muon": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),  # Jordan et al. 2024
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # Liu et al. 2025, "Muon is scalable"
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(4, 6), (9, 3)])
def test_sgd_with_momentum_and_nog_on_the_update_is_muon_without_decay(shape, scale, nesterov):
    """Muon as published, written out: momentum, Nesterov's look ahead, polar factor (here exact), scale, step."""
    rows, columns = shape
    layer = nn.Linear(columns, rows, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov)
    NearestOrthogonalGradient(optimizer, layer, on="update", scale=scale)
    weight, buffer = layer.weight.detach().numpy().copy(), np.zeros(shape)
    for i in range(5):
        gradient = gaussian(*shape, seed=i)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + gradient.numpy()
        update = gradient.numpy() + 0.9 * buffer if nesterov else buffer
        weight = weight - 0.05 * SCALES[scale](rows, columns) * exact_polar(update)
    # The update is read from the move of the weight: eps·|w|/lr of error, times the condition of the polar factor.
    assert np.abs(layer.weight.detach().numpy() - weight).max() < 1e-12


def test_it_equals_torchs_muon_up_to_the_iteration():
    """torch.optim.Muon with its polar factor made exact: the same weights after several steps."""
    if not hasattr(torch.optim, "Muon"):
        assert torch.__version__ < "2.9"  # there is none to compare with
        return
    import torch.optim._muon as theirs

    shape, original = (8, 5), theirs._zeropower_via_newtonschulz
    mine, other = (nn.Parameter(gaussian(*shape)) for _ in range(2))
    optimizer = torch.optim.SGD([mine], lr=0.05, momentum=0.95, nesterov=True)
    NearestOrthogonalGradient(optimizer, mine, on="update", scale="rms")
    muon = torch.optim.Muon([other], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    theirs._zeropower_via_newtonschulz = lambda G, *_: torch.from_numpy(exact_polar(G.numpy()))
    try:
        for i in range(5):
            mine.grad, other.grad = gaussian(*shape, seed=i), gaussian(*shape, seed=i)
            optimizer.step()
            muon.step()
    finally:
        theirs._zeropower_via_newtonschulz = original
    assert (mine - other).abs().max() < 1e-12


def test_decoupled_weight_decay_stays_outside():
    """AdamW: the decay shrinks the weight as ever, and only Adam's update is made orthogonal."""
    weight = gaussian(6, 4)
    mine, twin = nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = torch.optim.AdamW([mine], lr=0.02, weight_decay=0.5)
    NearestOrthogonalGradient(optimizer, mine, on="update")
    adam = torch.optim.Adam([twin], lr=0.02)  # AdamW without its decay moves by the same update wherever it stands
    for i in range(4):
        mine.grad, twin.grad = gaussian(6, 4, seed=i), gaussian(6, 4, seed=i)
        before = twin.detach().clone()
        optimizer.step()
        adam.step()
        update = exact_polar((before - twin.detach()).numpy())
        weight = weight * (1 - 0.02 * 0.5) - 0.02 * torch.from_numpy(update)
    assert (mine - weight).abs().max() < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_those_of_the_matrix(scale):
    for layer in (nn.Conv2d(3, 64, 3), nn.Conv2d(16, 8, 3), nn.ConvTranspose2d(6, 10, 2)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        NearestOrthogonalGradient(optimizer, layer, scale=scale)
        layer.weight.grad = gaussian(*layer.weight.shape).float()
        rows = layer.out_channels
        expected = polar_reference(layer, layer.weight.grad) * SCALES[scale](rows, layer.weight.numel() // rows)
        optimizer.step()
        assert (layer.weight.grad - expected).abs().max() < 1000 * EPS  # κ(G) < 100 roundings of entries below 2


def test_at_the_rms_scale_an_entry_has_the_size_of_an_adam_step():
    layer = nn.Conv2d(3, 64, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    NearestOrthogonalGradient(optimizer, layer, scale="rms")
    layer.weight.grad = gaussian(64, 3, 3, 3).float()
    optimizer.step()
    assert layer.weight.grad.square().mean().sqrt() == pytest.approx(0.2, rel=1e-5)


def test_a_rate_of_zero_moves_nothing():
    """As in the first step of a warm-up: no 0/0."""
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    nog = NearestOrthogonalGradient(optimizer, layer, on="update")
    layer.weight.grad = gaussian(3, 4).float()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert nog.counts()["0"] == {"treated": 0, "zero": 1, "nonfinite": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused_on_the_update(dtype):
    layer = nn.Linear(3, 4).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer 'fc' \(Linear\): on='update' .* keep the weight in float32"):
        NearestOrthogonalGradient(optimizer, {"fc": layer}, on="update")
    assert not optimizer._optimizer_step_pre_hooks
    NearestOrthogonalGradient(optimizer, {"fc": layer})


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_of_polar_makes_the_step(solver):
    layer = nn.Conv2d(3, 64, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    nog = NearestOrthogonalGradient(optimizer, {"conv": layer}, solver=solver)
    gradient = gaussian(64, 3, 3, 3).float()
    layer.weight.grad = gradient.clone()
    optimizer.step()
    error = layer.weight.grad.double() - polar_reference(layer, gradient)
    assert torch.linalg.matrix_norm(error.flatten(1), 2) < SOLVERS[solver]
    layer.weight.grad = torch.full_like(gradient, float("nan"))
    optimizer.step()
    layer.weight.grad = torch.zeros_like(gradient)
    optimizer.step()
    assert nog.counts()["conv"] == {"treated": 1, "zero": 1, "nonfinite": 1}
