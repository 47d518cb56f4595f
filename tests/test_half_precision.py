"""Half precision comes in and goes out; the spectral work between is done in float32, under autocast too."""

from __future__ import annotations

import pytest
import torch

import wellcond.linalg as wl
from function_table import FUNCTIONS
from helpers import as_tuple, relative_error, weighted_sum, with_spectrum

HALF = [torch.float16, torch.bfloat16]
SPECTRUM = (3.0, 2.0, 1.0, 0.5, 0.25, 0.2)
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)
EVERY_HALF = pytest.mark.parametrize("dtype", HALF)


@EVERY_HALF
@EVERY_FUNCTION
def test_half_in_gives_the_rounded_single_precision_result(name, dtype):
    f, x = FUNCTIONS[name].f, FUNCTIONS[name].make(SPECTRUM, dtype)
    for got, single in zip(as_tuple(f(x)), as_tuple(f(x.float())), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, single.to(dtype)) == 0.0


@EVERY_HALF
@EVERY_FUNCTION
def test_gradients_of_half_precision_come_back_in_half_precision(name, dtype):
    f, x = FUNCTIONS[name].f, FUNCTIONS[name].make(SPECTRUM, dtype).requires_grad_()
    outs = as_tuple(f(x))
    weights = [torch.randn(out.shape).to(dtype) for out in outs]
    (g,) = torch.autograd.grad(outs, x, weights)
    single = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(as_tuple(f(single)), single, [W.float() for W in weights])
    assert g.dtype == dtype
    # One rounding of the result, and the sums of gradients are formed in float32.
    assert relative_error(g, expected) < 4 * torch.finfo(dtype).eps


@EVERY_HALF
@EVERY_FUNCTION
def test_autocast_changes_nothing(name, dtype):
    """Neither the covariance nor any product is formed in bfloat16, which would cost 4e-3.

    The backward pass is outside the block, as PyTorch asks: inside it the derivatives of torch's own products are cast.
    """
    f, x = FUNCTIONS[name].f, FUNCTIONS[name].make(SPECTRUM, torch.float32)
    plain, cast = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = as_tuple(f(plain))
    with torch.autocast("cpu", dtype=dtype):
        got = as_tuple(f(cast))
    for inside, outside in zip(got, want, strict=True):
        assert inside.dtype == torch.float32
        assert relative_error(inside, outside) < 1e-5
    weights = [torch.randn(out.shape) for out in want]
    (expected,) = torch.autograd.grad(want, plain, weights)
    (g,) = torch.autograd.grad(got, cast, weights)
    assert relative_error(g, expected) < 1e-5


# This loss has no second derivative of what is linear or quadratic.
@pytest.mark.parametrize(
    "name",
    [n for n, f in FUNCTIONS.items() if f.twice and n not in ("powm-0", "powm-1", "covariance", "covariance-unbiased")],
)
def test_autocast_does_not_reach_second_derivatives(name):
    f, x = FUNCTIONS[name].f, FUNCTIONS[name].make(SPECTRUM, torch.float32)

    def curvature(x, autocast):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = f(x)
        (g,) = torch.autograd.grad(weighted_sum(out), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

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
