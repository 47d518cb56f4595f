"""Whitening that decomposes the features and not their covariance: it sees κ(P) up to 1/eps² instead of 1/eps."""

from __future__ import annotations

from functools import partial

import mpmath
import pytest
import torch
from torch.autograd import gradcheck

import wellcond.linalg as wl
from helpers import eps_of, features_with, geometric, relative_error

METHODS = pytest.mark.parametrize("method", ["zca", "cholesky"])


def through_the_covariance(X: torch.Tensor, method: str) -> torch.Tensor | None:
    """What the other way makes of it; None where it finds the covariance singular or indefinite."""
    try:
        return wl.whiten(X, method=method, via="covariance")
    except wl.NotPositiveSemidefiniteError:
        return None


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("d", "n"), [(5, 20), (5, 3), (4, 4), (5, 1), (1, 4), (1, 1)])
def test_it_is_the_same_function(method, dtype, d, n):
    X = torch.randn(2, d, n, dtype=dtype)
    got = wl.whiten(X, eps=0.1, method=method, via="factor")
    assert got.dtype == dtype and got.shape == X.shape
    # κ(P + εI) stays below 100 for ten standard deviations.
    want = wl.whiten(X, eps=0.1, method=method, via="covariance")
    assert (got - want).abs().max() < 100 * 10 * eps_of(dtype) * (1 + want.abs().max())


@METHODS
@pytest.mark.parametrize(("dtype", "kappa"), [(torch.float32, 1e10), (torch.float64, 1e24), (torch.complex64, 1e10)])
def test_condition_numbers_beyond_the_reach_of_the_covariance(method, dtype, kappa):
    """eps·√κ(P) is what a backward stable decomposition of A leaves; through P nothing of the small directions is."""
    X = features_with(geometric(5, kappa), 40, dtype)
    eye = torch.eye(5, dtype=dtype)
    bound = 30 * eps_of(dtype) * kappa**0.5
    Y = wl.whiten(X, method=method, via="factor")
    assert (wl.covariance(Y) - eye).abs().max() < bound < 0.5
    through = through_the_covariance(X, method)
    assert through is None or (wl.covariance(through) - eye).abs().max() > bound


@pytest.mark.parametrize(("dtype", "kappa"), [(torch.float32, 1e10), (torch.float64, 1e24)])
def test_zca_equals_mpmath_at_a_condition_number_of_the_inverse_square(dtype, kappa):
    X = features_with(geometric(4, kappa), 9, dtype)
    with mpmath.workdps(60):
        wide = mpmath.matrix(X.double().tolist())
        means = [sum(wide[i, j] for j in range(9)) / 9 for i in range(4)]
        centred = mpmath.matrix(4, 9)
        for i in range(4):
            for j in range(9):
                centred[i, j] = wide[i, j] - means[i]
        values, U = mpmath.eighe(centred * centred.T / 9)
        white = U * mpmath.diag([1 / mpmath.sqrt(v) for v in values]) * U.T * centred
        truth = torch.tensor([[float(white[i, j]) for j in range(9)] for i in range(4)], dtype=torch.float64)
    # The features' means are rounded too, which moves A by eps of its norm.
    assert relative_error(wl.whiten(X, via="factor"), truth) < 10 * eps_of(dtype) * kappa**0.5
    through = through_the_covariance(X, "zca")
    assert through is None or relative_error(through, truth) > 0.15


@pytest.mark.parametrize("kappa", [1e4, 1e8])
def test_the_gradient_keeps_what_the_value_has(kappa):
    """Float32 against double precision through the factor: 1/(σi + σj) times eps, with σ down to κ^{-1/2}."""
    X = features_with(geometric(4, kappa), 12, torch.float32)
    G = torch.randn(4, 12)

    def gradient(X, G, **options):
        X = X.clone().requires_grad_()
        return torch.autograd.grad(wl.whiten(X, **options), X, G)[0]

    truth = gradient(X.double(), G.double(), via="factor")
    assert relative_error(gradient(X, G, via="factor"), truth) < 10 * eps_of(torch.float32) * kappa**0.5
    # And in double precision, where κ = 1e8 is no trouble for the covariance, the two ways agree.
    assert relative_error(gradient(X.double(), G.double(), via="covariance"), truth) < 1e-14 * kappa


@METHODS
def test_undefined_and_batched_gradients_where_samples_are_few(method):
    X = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(partial(wl.whiten, method=method, eps=0.2, via="factor"), X, check_batched_grad=True)


def test_whitening_on_the_range_alone():
    X = features_with([3.0, 1.0, 0.0, 0.0], 4, torch.float32)
    P = wl.covariance(wl.whiten(X, rank="pinv", via="factor"))
    projection = X.double() @ torch.linalg.pinv(X.double(), rtol=1e-5)
    assert relative_error(P, projection) < 50 * eps_of(torch.float32)


def test_auto_takes_the_factor_where_samples_are_few():
    """Seen from the decomposition: n × n singular vectors, or d × d eigenpairs."""
    few, many = torch.randn(6, 3), torch.randn(6, 4)
    for X, way in ((few, "factor"), (many, "covariance")):
        assert torch.equal(wl.whiten(X, eps=0.1), wl.whiten(X, eps=0.1, via=way))
    assert not torch.equal(wl.whiten(few, eps=0.1, via="factor"), wl.whiten(few, eps=0.1, via="covariance"))


@METHODS
def test_a_singular_covariance_without_a_ridge_is_refused(method):
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"\(5, 3\).*singular.*eps > 0"):
        wl.whiten(torch.randn(5, 3), method=method, via="factor")
    X = torch.randn(3, 4, 20)
    X[1, 2] = X[1, 0]
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"singular.*batch index \(1,\)"):
        wl.whiten(X, method=method, via="factor")
    X[2, 0, 0] = torch.nan
    with pytest.raises(wl.NonFiniteMatrixError, match=r"X of shape.*batch index \(2,\)"):
        wl.whiten(X, method=method, via="factor")


@METHODS
@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e18, 1e30])
def test_features_of_any_scale_in_single_precision(method, scale):
    X = features_with([2.0, 1.0, 0.5], 30)
    got = wl.whiten((scale * X).float(), method=method, via="factor")
    assert relative_error(got, wl.whiten(X, method=method)) < 100 * eps_of(torch.float32)


def test_what_needs_the_covariance_is_refused():
    X = torch.randn(3, 9)
    for options, named in (
        ({"method": "pca"}, "method='pca'"),
        ({"rank": "floor"}, "rank='floor'"),
        ({"solver": "newton_schulz"}, "solver='newton_schulz'"),
    ):
        with pytest.raises(ValueError, match=f"{named} needs the covariance: take via='covariance'"):
            wl.whiten(X, via="factor", **options)
    with pytest.raises(ValueError, match=r"unknown way to whiten 'svd'"):
        wl.whiten(X, via="svd")
