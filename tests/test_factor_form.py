"""The square root of a covariance differentiated through the features: bounded at any condition number.

‖∂l/∂A‖ ≤ √2 ‖G‖ for Q = (A Aᴴ)^{1/2} (Araki and Yamagami 1981), so nothing is lost where the matrix is singular.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wellcond.linalg as wl
from helpers import eps_of, features_with, geometric, hermitian_part, relative_error


def gradient(X: torch.Tensor, G: torch.Tensor, **options) -> torch.Tensor:
    X = X.detach().clone().requires_grad_()
    return torch.autograd.grad(wl.covariance_sqrtm(X, **options), X, G)[0]


def exact_gradient(X: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """2 [U (H ∘ R) + (I − UUᴴ) G U] Vᴴ J-centred, from LAPACK's SVD of the float64 factor on its rank."""
    n = X.shape[-1]
    A = X.double() - X.double().mean(-1, keepdim=True)
    U, sigma, Vh = torch.linalg.svd(A / n**0.5, full_matrices=False)
    keep = sigma > 1e-10 * sigma[0]
    U, sigma, Vh = U[:, keep], sigma[keep], Vh[keep]
    G = hermitian_part(G.double())
    H = U.mH @ G @ U
    R = sigma[None, :] / (sigma[:, None] + sigma[None, :])
    inside = U @ (H * R)
    outside = G @ U - U @ H
    full = 2 * (inside + outside) @ Vh / n**0.5
    return full - full.mean(-1, keepdim=True)


def test_single_precision_gradient_at_rank_deficiency_is_as_good_as_double():
    """256 channels on a 7 × 7 map, rank 48 (mathematics.md, section 3): 9e-7 was measured; 2e-6 is the promise."""
    X = torch.randn(256, 49).relu()
    G = hermitian_part(torch.randn(256, 256))
    got = gradient(X, G)
    truth = exact_gradient(X, G)
    assert relative_error(got, truth) < 2e-6
    assert relative_error(gradient(X.double(), G.double()), truth) < 1e-12
    U, sigma, _ = torch.linalg.svd((X.double() - X.double().mean(-1, keepdim=True)) / 7, full_matrices=False)
    assert relative_error(wl.covariance_sqrtm(X), (U * sigma) @ U.mH) < 20 * eps_of(torch.float32)


@pytest.mark.parametrize("n", [9, 16, 17, 64, 1024])
@pytest.mark.parametrize("kind", ["repeated", "dead", "sum"])
def test_channels_that_depend_on_others_keep_the_same_promise(kind, n):
    """n ≥ d does not make a covariance regular: channels may repeat, be dead, or add up, and n = d has rank d − 1.

    The dependence is exact in float32, so that the truth has no noise in the null space.
    """
    X = torch.randint(-64, 65, (16, n)).float() / 16
    if kind == "repeated":
        X[12:] = X[:4]
    elif kind == "dead":
        X[12:] = 0.0
    else:
        X[12:] = X[:4] + X[4:8]
    G = hermitian_part(torch.randn(16, 16))
    got, truth = gradient(X, G), exact_gradient(X, G)
    assert relative_error(got, truth) < 2e-6
    assert relative_error(gradient(X.double(), G.double()), truth) < 1e-9
    assert got.norm() * n**0.5 <= math.sqrt(2) * G.norm() * (1 + 1e-4)


@pytest.mark.parametrize(("d", "n"), [(5, 3), (4, 4), (3, 7), (3, 1), (1, 4), (1, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_squared_the_root_is_the_covariance_to_full_precision(d, n, dtype):
    X = torch.randn(d, n, dtype=dtype)
    Q, P = wl.covariance_sqrtm(X), torch.cov(X, correction=0).reshape(d, d)
    assert (Q @ Q - P).abs().max() < 100 * eps_of(dtype) * (1 + P.abs().max().item())
    assert torch.linalg.eigvalsh(Q).min() > -100 * eps_of(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [4, 5, 9])
def test_the_factor_equals_going_through_the_covariance_where_both_are_defined(n, dtype):
    """solver='eigh' goes through P. At n > d the covariance is regular and both gradients exist."""
    X = torch.randn(3, n, dtype=dtype)
    G = torch.randn(3, 3, dtype=dtype)
    assert relative_error(wl.covariance_sqrtm(X), wl.covariance_sqrtm(X, solver="eigh")) < 1e-13
    assert relative_error(gradient(X, G), gradient(X, G, solver="eigh")) < 1e-11


@pytest.mark.parametrize(("dtype", "slack", "limit"), [(torch.float64, 1e-6, 8.0), (torch.float32, 1e-4, 0.0)])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), d=st.integers(2, 6), log_kappa=st.floats(0.0, 15.0), seed=st.integers(0, 2**20))
def test_the_gradient_is_bounded_by_root_two_whatever_the_condition_number(
    dtype, slack, limit, data, d, log_kappa, seed
):
    torch.manual_seed(seed)
    n, scale = max(d + data.draw(st.integers(-3, 4)), 2), 10 ** data.draw(st.floats(-limit, limit))
    rank = min(d, n - 1)
    X = features_with([scale * v for v in geometric(rank, 10**log_kappa)] + [0.0] * (d - rank), n, dtype)
    G = torch.randn(d, d, dtype=dtype)
    # ∂l/∂X = (∂l/∂A) J-centred /√n: centring is a projection and can only shorten. NaN is not below it either.
    assert gradient(X, G).norm() * n**0.5 <= math.sqrt(2) * hermitian_part(G).norm() * (1 + slack)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-6, 1e6, 1e18, 1e30])
@pytest.mark.parametrize("n", [3, 9])
def test_features_of_any_scale(scale, n):
    """(cX)(cX)ᵀ overflows long before cX does; the root is only as large as cX."""
    X = torch.randn(5, n, dtype=torch.float64)
    scaled = (scale * X).float()
    G = hermitian_part(torch.randn(5, 5))
    exact = scaled.double() / scale
    assert relative_error(wl.covariance_sqrtm(scaled).double() / scale, wl.covariance_sqrtm(exact)) < 1e-4
    assert relative_error(gradient(scaled, G), exact_gradient(exact, G)) < 1e-3


def test_a_batch_may_mix_ranks():
    full, low = torch.randn(2, 5, 4, dtype=torch.float64)
    zero = torch.zeros_like(low)
    low[:, 2:] = low[:, :2]
    G = hermitian_part(torch.randn(5, 5, dtype=torch.float64))
    together = gradient(torch.stack([full, low, zero]), G.expand(3, 5, 5))
    for got, alone in zip(together, (full, low, zero), strict=True):
        assert (got - gradient(alone, G)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [3, 8])
def test_second_derivatives_in_single_precision_are_close_to_double(n):
    X = features_with([3.0, 1.0, *([0.5, 0.2, 0.1] if n > 5 else [0.0] * 3)], n, torch.float32)
    E, G = torch.randn(5, n), hermitian_part(torch.randn(5, 5))

    def curvature(X, E, G):
        X = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(wl.covariance_sqrtm(X), X, G, create_graph=True)
        return torch.autograd.grad((g * E).sum(), X)[0]

    # κ ≤ 30: the second derivative of a root amplifies by κ^{3/2} at most.
    got, truth = curvature(X, E, G), curvature(X.double(), E.double(), G.double())
    assert relative_error(got, truth) < 30**1.5 * 50 * eps_of(torch.float32)


def test_correction_scales_the_root():
    X = torch.randn(4, 3, dtype=torch.float64)
    assert relative_error(wl.covariance_sqrtm(X, correction=1), wl.covariance_sqrtm(X) * (3 / 2) ** 0.5) < 1e-13


def test_an_approximate_solver_goes_through_the_covariance():
    X = torch.randn(4, 9, dtype=torch.float64)
    want = wl.sqrtm(wl.covariance(X), solver="newton_schulz")
    assert relative_error(wl.covariance_sqrtm(X, solver="newton_schulz"), want) < 1e-13
