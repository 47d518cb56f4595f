"""exp(A) − I without the host: its value beside SciPy's, its own derivative beside autograd's, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from treatment_models import gaussian
from wellcond.orthogonality._skew_exponential import exponential_less_identity
from wellcond.orthogonality._stiefel_maps import exponential_map, polished


def skew(d: int, norm: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    A = gaussian(1, d, d)
    A = A - A.mT
    return (A * (norm / torch.linalg.matrix_norm(A, 2)) if d > 1 else A).to(dtype)


@pytest.mark.parametrize(("dtype", "reach"), [(torch.float32, 240.0), (torch.float64, 1000.0)])
@pytest.mark.parametrize("norm", [1e-12, 1e-3, 1.0, 30.0, None])
def test_it_is_scipys(dtype, reach, norm):
    """To the rounding of the angles, eps·‖A‖ for each of the squarings; nothing is lost where A is small."""
    A = skew(12, norm or reach, dtype)
    expected = scipy.linalg.expm(A[0].double().numpy()) - np.eye(12)
    size = min(1.0, norm or reach)
    error = np.abs(exponential_less_identity(A)[0].double().numpy() - expected).max()
    # SciPy loses the digits of exp − I that the identity has.
    assert error <= 20 * torch.finfo(dtype).eps * (norm or reach) + (1e-15 if size < 1 else 0)


@pytest.mark.parametrize("norm", [1e3, 1e5])
def test_beyond_reach_it_is_orthogonal_all_the_same(norm):
    A = skew(8, norm)
    E = exponential_less_identity(A) + torch.eye(8)
    assert torch.dist(E.mT @ E, torch.eye(8, dtype=torch.float64).expand_as(E)) <= 1e-13 * norm


@pytest.mark.parametrize("norm", [0.0, 1.0, 20.0])
def test_its_derivatives_are_autograds(norm):
    A = skew(4, norm or 1.0) * (norm > 0)
    A = (A + 0.1 * gaussian(1, 4, 4, seed=3) * (norm > 0)).requires_grad_()  # not skew: similar to one up to little
    assert torch.autograd.gradcheck(exponential_less_identity, A)
    assert torch.autograd.gradgradcheck(exponential_less_identity, A)
    assert torch.autograd.gradcheck(exponential_less_identity, A, check_batched_grad=True, fast_mode=True)
    G = gaussian(1, 4, 4, seed=5)
    (own,) = torch.autograd.grad(exponential_less_identity(A), A, G)
    (truth,) = torch.autograd.grad(torch.linalg.matrix_exp(A), A, G)
    assert torch.dist(own, truth) <= 1e-12 * truth.norm()
    tangent = gaussian(1, 4, 4, seed=6)
    _, forward = torch.func.jvp(exponential_less_identity, (A.detach(),), (tangent,))
    assert (forward * G).sum().item() == pytest.approx((own * tangent).sum().item(), rel=1e-11)


@pytest.mark.parametrize("shape", [(64, 27), (90, 27), (20, 20)])
def test_one_and_the_other_form_have_the_same_gradient_in_single_precision(shape):
    V, G = gaussian(2, *shape, seed=1), gaussian(2, *shape, seed=2)
    F = torch.linalg.qr(gaussian(2, *shape, seed=3))[0]

    def gradient(dtype):
        X = V.clone().to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(polished(exponential_map(X, F.to(dtype))), X, G.to(dtype))
        return found.double()

    truth = gradient(torch.float64)
    V = V.detach()
    S = V @ F.mT - F @ V.mT
    tolerance = 10 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(S, 2).max())
    assert torch.dist(gradient(torch.float32), truth) <= tolerance * truth.norm()


def test_polishing_squares_the_gap_and_leaves_the_derivative():
    W = torch.linalg.qr(gaussian(1, 9, 4))[0] * (1 + 1e-5)
    P = polished(W)
    assert torch.dist(P.mT @ P, torch.eye(4).expand(1, 4, 4).double()) <= 1e-9
    X = gaussian(9, 4, seed=1).requires_grad_()
    F = torch.linalg.qr(gaussian(9, 4, seed=2))[0]
    assert torch.autograd.gradcheck(lambda x: polished(exponential_map(x, F)[None]), X)
    assert torch.autograd.gradgradcheck(lambda x: polished(exponential_map(x, F)[None]), X)
