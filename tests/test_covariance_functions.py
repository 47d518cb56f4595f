"""Root, logarithm and powers of a covariance from its features: values, gradients, bounds where the rank is short.

The truths are mpmath at 50 digits on the covariance, and Daleckii and Krein's formula over a full d × d basis in double
precision, which the library never forms when there are fewer samples than channels.
"""

from __future__ import annotations

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import wellcond.linalg as wl
from helpers import eps_of, features_with, geometric, hermitian_part, mp_function, relative_error

FUNCTIONS = {
    "sqrt": (wl.covariance_sqrtm, mpmath.sqrt),
    "log": (wl.covariance_logm, mpmath.log),
    "minus-half": (partial(wl.covariance_powm, exponent=-0.5), lambda x: 1 / mpmath.sqrt(x)),
    "0.75": (partial(wl.covariance_powm, exponent=0.75), lambda x: x ** mpmath.mpf(0.75)),
    "square": (partial(wl.covariance_powm, exponent=2.0), lambda x: x * x),
}
ALL = pytest.mark.parametrize("name", FUNCTIONS)
SHAPES = pytest.mark.parametrize(("d", "n"), [(5, 3), (4, 4), (3, 7), (3, 1), (1, 4), (1, 1), (6, 2)])


def daleckii_krein(X: torch.Tensor, G: torch.Tensor, f, df, eps: float) -> torch.Tensor:
    """∂l/∂X = 2 L A J-centred /√n, L = U (f[λi, λj] ∘ UᴴGU) Uᴴ, by plain quotients over all d eigenvectors."""
    n = X.shape[-1]
    A = (X.double() - X.double().mean(-1, keepdim=True)) / n**0.5
    U, sigma, _ = torch.linalg.svd(A, full_matrices=True)
    eigvals = torch.zeros(A.shape[0], dtype=torch.float64)
    eigvals[: len(sigma)] = sigma.square()
    eigvals[eigvals < 1e-13 * eigvals.max()] = 0.0
    x = eigvals + eps
    gap = x[:, None] - x[None]
    close = gap.abs() < 1e-9 * x.max()
    K = torch.where(close, df(x)[:, None], (f(x)[:, None] - f(x)[None]) / torch.where(close, 1.0, gap))
    gradient = 2 * U @ (K * (U.T @ hermitian_part(G.double()) @ U)) @ U.T @ A / n**0.5
    return gradient - gradient.mean(-1, keepdim=True)


@ALL
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_values_equal_mpmath_for_every_shape(name, d, n, dtype):
    f, scalar = FUNCTIONS[name]
    X = torch.randn(d, n, dtype=dtype)
    wide = X.to(torch.complex128 if dtype.is_complex else torch.float64)
    P = hermitian_part((wide - wide.mean(-1, keepdim=True)) @ wide.mH / n)
    truth = mp_function(P + 0.25 * torch.eye(d), scalar)
    # The truth's own covariance is off by eps64 of P; what is left is the rounding of the result.
    bound = 4 * eps_of(dtype) + 100 * eps_of(torch.float64) * (1 + P.norm().item() / 0.25)
    # log I = 0, hence the 1.
    assert (f(X, eps=0.25).to(truth.dtype) - truth).norm() <= bound * (1 + truth.norm())
    assert f(X, eps=0.25).dtype == dtype


@ALL
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_both_orders_match_finite_differences(name, d, n, dtype):
    X = torch.randn(d, n, dtype=dtype, requires_grad=True)
    f = partial(FUNCTIONS[name][0], eps=0.3)
    assert gradcheck(f, X, check_forward_ad=True, check_batched_grad=True, fast_mode=dtype.is_complex)
    assert gradgradcheck(f, X, fast_mode=True, check_fwd_over_rev=True)


def test_powers_from_one_half_on_need_no_ridge_at_rank_deficiency():
    X = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for exponent in (1.0, 1.5, 2.0, 3.0):
        assert gradcheck(partial(wl.covariance_powm, exponent=exponent), X)
    # At exactly 1/2 it is the square root, whose gradient is the bounded one.
    G = hermitian_part(torch.randn(5, 5, dtype=torch.float64))
    (got,) = torch.autograd.grad(wl.covariance_powm(X, 0.5), X, G)
    (want,) = torch.autograd.grad(wl.covariance_sqrtm(X), X, G)
    assert relative_error(got, want) < 1e-12


SCALARS = {
    "sqrt": (torch.sqrt, lambda x: 0.5 * x**-0.5),
    "log": (torch.log, torch.reciprocal),
    "minus-half": (torch.rsqrt, lambda x: -0.5 * x**-1.5),
    "0.75": (lambda x: x**0.75, lambda x: 0.75 * x**-0.25),
    "square": (torch.square, lambda x: 2 * x),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "sqrt"])  # the root: test_factor_form
@pytest.mark.parametrize(("d", "n"), [(256, 49), (16, 16), (16, 64)])
def test_single_precision_is_as_good_as_double_at_rank_deficiency(name, d, n):
    """256 channels on a 7 × 7 map, and channels that repeat: double precision inside, one rounding at the end."""
    X = torch.randn(d, n).relu()
    if n >= d:
        X[12:] = X[:4]
    G = hermitian_part(torch.randn(d, d))
    tracked = X.clone().requires_grad_()
    eps = 1e-3
    (got,) = torch.autograd.grad(FUNCTIONS[name][0](tracked, eps=eps), tracked, G)
    # eps32 of the result, and of the incoming gradient nothing: it is exact in double precision.
    assert relative_error(got, daleckii_krein(X, G, *SCALARS[name], eps)) < 2 * eps_of(torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 6),
    n=st.integers(2, 8),
    log_kappa=st.floats(0.0, 15.0),
    log_eps=st.floats(-12.0, 2.0),
    seed=st.integers(0, 2**20),
)
def test_the_gradient_of_the_logarithm_is_bounded_by_the_ridge(d, n, log_kappa, log_eps, seed):
    """2 max log(1 + σ²/ε)/σ = 1.61/√ε: the divided differences only fall when the other eigenvalue grows."""
    torch.manual_seed(seed)
    rank = min(d, n - 1)
    X = features_with([*geometric(rank, 10**log_kappa), *[0.0] * (d - rank)], n).requires_grad_()
    G = torch.randn(d, d, dtype=torch.float64)
    (g,) = torch.autograd.grad(wl.covariance_logm(X, eps=10**log_eps), X, G)
    assert g.norm() * n**0.5 <= 1.61 / 10 ** (log_eps / 2) * hermitian_part(G).norm() * (1 + 1e-6)


@ALL
@pytest.mark.parametrize("n", [3, 8])
def test_on_the_range_alone(name, n):
    """rank="pinv": f of the eigenvalues in the range, zero outside, and no gradient within the null space."""
    X = features_with([2.0, 0.5, 0.0, 0.0], n).requires_grad_()
    f, (scalar, _) = FUNCTIONS[name][0], SCALARS[name]
    F = f(X, rank="pinv")
    U, sigma, _ = torch.linalg.svd((X - X.mean(-1, keepdim=True)).detach() / n**0.5)
    truth = (U[:, :2] * scalar(sigma[:2].square())) @ U[:, :2].T
    assert relative_error(F, truth) < 1e-12
    null = U[:, 2:]
    (g,) = torch.autograd.grad((null.T @ F @ null).square().sum() + (null.T @ F @ null).sum(), X)
    assert g.abs().max() < 1e-9
    # Along directions that keep the rank: scaling every sample multiplies P by the square.
    h = 1e-5
    quotient = (f((1 + h) * X.detach(), rank="pinv") - f((1 - h) * X.detach(), rank="pinv")) / (2 * h)
    tangent = torch.func.jvp(partial(f, rank="pinv"), (X.detach(),), (X.detach(),))[1]
    assert relative_error(tangent, quotient) < 1e-8


@pytest.mark.parametrize("shape", [(256, 9), (9, 256)])
def test_only_the_smaller_side_is_decomposed(monkeypatch, shape):
    real, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda P: seen.append(tuple(P.shape)) or real(P))
    X = torch.randn(shape, requires_grad=True)
    wl.covariance_logm(X, eps=0.1).sum().backward()
    assert seen == [(9, 9)]


@ALL
@pytest.mark.parametrize("shape", [(4, 3), (3, 8), (4, 1)])
def test_constant_features_give_the_function_of_the_ridge(name, shape):
    X = torch.full(shape, 2.5, requires_grad=True)
    F = FUNCTIONS[name][0](X, eps=0.25)
    value = SCALARS[name][0](torch.tensor(0.25, dtype=torch.float64))
    assert relative_error(F, value * torch.eye(shape[0])) < eps_of(torch.float32)
    (g,) = torch.autograd.grad(F.sum(), X, create_graph=True)
    assert torch.equal(g, torch.zeros_like(g))
    (h,) = torch.autograd.grad(g.sum(), X)
    assert torch.isfinite(h).all()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("n", [3, 8])
def test_features_of_any_scale(scale, n):
    """log(c² P) = log P + 2 log c I; in single precision c² P would leave the range."""
    X = torch.randn(5, n, dtype=torch.float64)
    got = wl.covariance_logm((scale * X).float(), eps=scale**2)
    exact = (scale * X).float().double() / scale
    want = wl.covariance_logm(exact, eps=1.0) + 2 * math.log(scale) * torch.eye(5)
    assert relative_error(got, want) < 2 * eps_of(torch.float32)


@pytest.mark.parametrize("f", [wl.covariance_logm, partial(wl.covariance_powm, exponent=-1.0)])
def test_a_singular_covariance_without_a_ridge_is_refused(f):
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"\(4, 3\).*singular.*eps > 0, or rank='pinv'"):
        f(torch.randn(4, 3))
    X = torch.randn(2, 3, 9)
    X[1, 2] = X[1, 1]
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"batch index \(1,\)"):
        f(X)
    f(X[:1])


def test_bad_arguments_name_themselves():
    X = torch.randn(3, 9)
    with pytest.raises(ValueError, match=r"unknown rank policy for features 'floor'.*ridge, pinv, raise"):
        wl.covariance_logm(X, rank="floor")
    with pytest.raises(ValueError, match=r"eps=0\.1 .*rank='pinv' takes none"):
        wl.covariance_logm(X, rank="pinv", eps=0.1)
    X = X.requires_grad_()
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.func.grad(
            lambda t: torch.func.grad(torch.func.grad(lambda s: wl.covariance_logm(s * X, eps=1.0).sum()))(t)
        )(torch.tensor(1.0))
