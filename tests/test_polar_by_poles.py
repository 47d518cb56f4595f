"""The polar factor by one batch of solutions: as exact as its number of poles says, at any scale, and where it ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import with_spectrum
from treatment_models import gaussian
from wellcond.orthogonality import NearestOrthogonalGradient
from wellcond.orthogonality._polar_by_poles import POLES, ROWS, SMALLEST, by_poles, inverse_root_poles
from wellcond.orthogonality._polar_factors import KINDS, polar_factors

EPS = torch.finfo(torch.float32).eps


def with_singular_values(m: int, n: int, values: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """A float32 matrix, and the polar factor of that very matrix by NumPy in double precision."""
    rng = np.random.default_rng(0)
    U, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    V, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    A = torch.from_numpy((U * values) @ V.T).float()
    U, _, Vt = np.linalg.svd(A.double().numpy(), full_matrices=False)
    return A, U @ Vt


@pytest.mark.parametrize(("count", "smallest"), [(8, 1e-2), (16, 1e-4), (POLES, SMALLEST)])
def test_the_sum_of_poles_is_the_inverse_root_to_its_bound(count, smallest):
    """The midpoint rule is off by 4 exp(−N π²/log(4/ℓ)), Zolotarev's rate, and reaches that at some point."""
    shifts, weights = np.array(inverse_root_poles(count, smallest)).T
    assert (shifts > 0).all() and (weights > 0).all()
    x = np.geomspace(smallest**2, 1, 4001)
    error = np.abs((weights / (shifts + x[:, None])).sum(1) * np.sqrt(x) - 1).max()
    bound = 4 * math.exp(-count * math.pi**2 / math.log(4 / smallest))
    assert 0.2 * bound < error < 1.1 * bound + 1e-14


@pytest.mark.parametrize("shape", [(64, 27), (27, 64), (ROWS, ROWS), (5, 1), (1, 1)])
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e5])
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
def test_it_is_the_polar_factor(shape, kappa, scale):
    """Off by what the poles are, 2.1e-7, and by the rounding of the Gram matrix: eps κ² in double precision."""
    A, expected = with_singular_values(*shape, np.geomspace(1, 1 / kappa, min(shape)))
    A = A * 2.0 ** round(math.log2(scale))  # no rounding
    found, size = by_poles(A.double())
    assert np.abs(found.numpy() - expected).max() <= 2.1e-7 + 20 * min(shape) * 2.3e-16 * kappa**2
    truth = torch.linalg.matrix_norm(A.double().mT @ A.double())
    assert size.item() == pytest.approx(truth.item(), rel=1e-12)


def test_singular_values_beyond_reach_end_between_0_and_1():
    A, _ = with_singular_values(40, 20, np.r_[np.ones(10), np.geomspace(1e-5, 1e-7, 9), 0.0])
    sigma = torch.linalg.svdvals(by_poles(A.double())[0])
    # At κ = 1e5 the Gram matrix, of κ² = 1e10, leaves some digits less.
    assert (sigma <= 1 + 5e-6).all() and (sigma[:10] >= 1 - 3e-7).all() and (sigma >= 0).all()


def test_batches_are_one_by_one_and_kinds_tell_which_have_a_factor():
    tiny = torch.finfo(torch.float32).tiny
    G = gaussian(6, 5, 4, dtype=torch.float32)
    G[1] *= 0
    G[2, 0, 0] = torch.nan
    G[3, 0, 0] = -torch.inf
    G[4] = 0
    G[4, 0, 0] = tiny / 4
    for solver in ("poles", "svd", "minimax"):
        factor, kind, work = polar_factors(G, solver)
        found = torch.where(kind == 1, factor, work).to(G.dtype)
        assert [KINDS[k] for k in kind.flatten().tolist()] == [
            "treated", "zero", "nonfinite", "nonfinite", "zero", "treated",
        ]  # fmt: skip
        for i in (1, 2, 3, 4):
            assert torch.equal(found[i].nan_to_num(7.0), G[i].nan_to_num(7.0))
        for i in (0, 5):
            U, _, Vh = torch.linalg.svd(G[i].double(), full_matrices=False)
            assert (found[i] - U @ Vh).abs().max() <= 1e-6
    assert polar_factors(G.to(torch.bfloat16), "poles")[0].dtype == torch.float64


@pytest.mark.parametrize("scale", ["paper", "gradient", "rms", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_by_poles_is_a_step_by_the_decomposition(scale, dtype):
    gradients = []
    for solver in ("svd", "poles"):
        layer = nn.Conv2d(6, 8, 3, groups=2).to(dtype)
        layer.weight.grad = gaussian(8, 3, 3, 3, dtype=torch.float32).to(dtype) * 1e-3
        layer.weight.grad[:4] *= 50
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        nog = NearestOrthogonalGradient(optimizer, {"conv": layer}, scale=scale, solver=solver)
        optimizer.step()
        gradients.append(layer.weight.grad.float())
        assert nog.counts() == {"conv": {"treated": 2, "zero": 0, "nonfinite": 0}}
    # The decomposition in single precision is off by 10 eps κ(G), with κ = 3 here.
    tolerance = (2 if dtype == torch.bfloat16 else 30) * torch.finfo(dtype).eps
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance * gradients[0].abs().max().item())


def test_an_unknown_solver_is_refused_with_the_nearest_name():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'pole'; did you mean 'poles'"):
        NearestOrthogonalGradient(torch.optim.SGD(layer.parameters(), lr=0.1), layer, solver="pole")


def test_a_saved_state_has_the_counts_in_the_order_of_before():
    """The state of versions that counted (treated, zero, nonfinite) goes on."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, {"fc": layer})
    nog.load_state_dict({"counts": {"fc": torch.tensor([5, 3, 2])}})
    layer.weight.grad = torch.zeros(2, 3)
    optimizer.step()
    assert nog.counts() == {"fc": {"treated": 5, "zero": 4, "nonfinite": 2}}
    assert nog.state_dict()["counts"]["fc"].tolist() == [5, 4, 2]


def test_positive_definite_matrices_have_the_identity():
    P = with_spectrum((3.0, 1.0, 1e-3), torch.float32, (2,))
    assert (by_poles(P.double())[0] - torch.eye(3)).abs().max() <= 2e-6
