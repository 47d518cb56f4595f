"""Half precision comes in and goes out; the spectral work between is done in float32, under autocast too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import wellcond.linalg as wl
from helpers import features_with, relative_error, weighted_sum, with_spectrum

HALF = [torch.float16, torch.bfloat16]
MATRIX = {
    "sqrtm": wl.sqrtm,
    "invsqrtm": wl.invsqrtm,
    "newton_schulz": partial(wl.invsqrtm, solver="newton_schulz"),
    "minimax": partial(wl.sqrtm, solver="minimax"),
    "status": lambda P: wl.invsqrtm_ex(P).root,
    "pinv": partial(wl.invsqrtm, rank="pinv"),
    "pair": lambda P: wl.sqrtm_invsqrtm(P)[1],
    "powm": partial(wl.powm, exponent=0.3),
    "logm": wl.logm,
    "expm": wl.expm,
    "lyapunov": lambda P: wl.lyapunov(P, P),
}
FEATURES = {
    "covariance": wl.covariance,
    "covariance_sqrtm": wl.covariance_sqrtm,
    "covariance_sqrtm of few samples": lambda X: wl.covariance_sqrtm(X[:, :4]),
    "covariance_logm": wl.covariance_logm,
    "covariance_powm of few samples": lambda X: wl.covariance_powm(X[:, :4], -0.7, eps=0.1),
    "zca": wl.whiten,
    "zca from the factor": partial(wl.whiten, via="factor"),
    "cholesky from the factor": partial(wl.whiten, method="cholesky", via="factor"),
    "relative": partial(wl.whiten, eps=1e-3, relative=True),
    "cholesky": partial(wl.whiten, method="cholesky"),
    "pca": partial(wl.whiten, method="pca"),
    "polar": wl.polar,
    "polar of a wide matrix": lambda X: wl.polar(X.mT),
}


def matrix() -> torch.Tensor:
    return with_spectrum([3.0, 2.0, 1.0, 0.5, 0.25, 0.2], torch.float32)


def features() -> torch.Tensor:
    return features_with([3.0, 2.0, 1.0, 0.5, 0.25, 0.2], 40, torch.float32)


CASES = [pytest.param(f, matrix, id=n) for n, f in MATRIX.items()] + [
    pytest.param(f, features, id=n) for n, f in FEATURES.items()
]


# Eigenvectors are differentiated once; the covariance is quadratic: its loss here has no second derivative.
TWICE = [c for c in CASES if c.id not in ("pca", "covariance", "polar of a wide matrix")]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("f", "make"), CASES)
def test_half_in_gives_the_rounded_single_precision_result(f, make, dtype):
    x = make().to(dtype)
    got = f(x)
    assert got.dtype == dtype
    assert relative_error(got, f(x.float()).to(dtype)) == 0.0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("f", "make"), CASES)
def test_gradients_of_half_precision_come_back_in_half_precision(f, make, dtype):
    x = make().to(dtype).requires_grad_()
    out = f(x)
    W = torch.randn(out.shape).to(dtype)
    (g,) = torch.autograd.grad(out, x, W)
    single = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(f(single), single, W.float())
    assert g.dtype == dtype
    # One rounding of the result, and the sums of gradients are formed in float32.
    assert relative_error(g, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("f", "make"), CASES)
def test_autocast_changes_nothing(f, make, dtype):
    """Neither the covariance nor any product is formed in bfloat16, which would cost 4e-3.

    The backward pass is outside the block, as PyTorch asks: inside it the derivatives of torch's own products are cast.
    """
    x = make()
    plain, cast = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = f(plain)
    with torch.autocast("cpu", dtype=dtype):
        got = f(cast)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-5
    W = torch.randn(want.shape)
    (expected,) = torch.autograd.grad(want, plain, W)
    (g,) = torch.autograd.grad(got, cast, W)
    assert relative_error(g, expected) < 1e-5


@pytest.mark.parametrize(("f", "make"), TWICE)
def test_autocast_does_not_reach_second_derivatives(f, make):
    def curvature(x, autocast):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = f(x)
        (g,) = torch.autograd.grad(weighted_sum(out), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    x = make()
    want = curvature(x.double(), False)
    got, plain = curvature(x, True), curvature(x, False)
    assert relative_error(got, plain) < 1e-5
    # κ = 15: the second derivatives amplify eps = 1.2e-7 by κ^{5/2} ≈ 900, a few times; bfloat16's is 4e-3.
    assert relative_error(got, want) < 5e-4


def test_covariance_of_a_convolution_under_autocast_is_that_of_its_rounded_output():
    conv = torch.nn.Conv2d(3, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = conv(torch.randn(4, 3, 12, 12))
        X = y.transpose(0, 1).flatten(1)
        assert X.dtype == torch.bfloat16
        P = wl.covariance(X.float())
    assert relative_error(P, torch.cov(X.double(), correction=0)) < 1e-5


def test_double_precision_stays_double_under_autocast():
    P = with_spectrum([3.0, 1.0, 0.1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Q = wl.sqrtm(P)
    assert Q.dtype == torch.float64 and relative_error(Q @ Q, P) < 1e-14


def test_lyapunov_promotes_its_two_dtypes():
    Q, G = torch.eye(2, dtype=torch.float64) * 2, torch.ones(2, 2, dtype=torch.bfloat16)
    assert wl.lyapunov(Q, G).dtype == torch.float64
    X = wl.lyapunov(torch.eye(2) * 2, torch.ones(2, 2, dtype=torch.complex64))
    assert X.dtype == torch.complex64 and relative_error(X, torch.full((2, 2), 0.25 + 0j)) < 1e-7


def test_a_float16_covariance_that_overflows_is_infinite_and_not_wrong():
    """Features of 300 have a variance of 9e4, above the largest float16: float32 work holds it, float16 does not."""
    X = (300 * torch.tensor([[1.0, -1.0]])).half()
    assert wl.covariance(X).item() == float("inf")
    assert wl.covariance_sqrtm(X).item() == 300.0
