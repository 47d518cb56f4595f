"""Whitening gives the identity for covariance; its three methods differ by a rotation only."""

from __future__ import annotations

import pytest
import torch

import wellcond.linalg as wl
from helpers import eps_of, features_with, geometric, relative_error

METHODS = ("zca", "pca", "cholesky")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4])
def test_the_covariance_is_the_identity(method, dtype, kappa):
    X = features_with(geometric(5, kappa), 40, dtype) + 3
    Y = wl.whiten(X, method=method)
    assert Y.dtype == dtype
    # S P S = I up to the relative error of S, eps·κ, and the offset of 3 rounds the samples: √κ·eps·3.
    bound = 50 * eps_of(dtype) * max(kappa, 3 * kappa**0.5)
    assert (wl.covariance(Y) - torch.eye(5, dtype=dtype)).abs().max() < bound
    assert Y.mean(-1).abs().max() < bound


@pytest.mark.parametrize("method", METHODS)
def test_the_unbiased_estimate_too(method):
    X = torch.randn(3, 7, dtype=torch.float64)
    Y = wl.whiten(X, method=method, correction=1)
    assert (torch.cov(Y) - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [1e-2, 1.0])
def test_a_ridge_shrinks_each_direction_by_its_own_factor(method, eps):
    """W (P + εI) Wᴴ = I, so the covariance of the result has eigenvalues λ/(λ + ε)."""
    eigvals = torch.tensor([3.0, 1.0, 0.2, 0.01], dtype=torch.float64)
    Y = wl.whiten(features_with(eigvals.tolist(), 12), eps=eps, method=method)
    got = torch.linalg.eigvalsh(wl.covariance(Y)).flip(-1)
    assert (got - eigvals / (eigvals + eps)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_zca_is_the_whitening_nearest_to_the_data(dtype):
    """tr of the cross-covariance is largest for ZCA (Kessy, Lewin and Strimmer 2018); its map is Hermitian positive."""
    X = features_with([4.0, 1.0, 0.3], 20, dtype)
    closeness = {m: (wl.whiten(X, method=m) * X.conj()).sum().real for m in METHODS}
    assert closeness["zca"] >= max(closeness.values()) - 1e-10
    Y = wl.whiten(X)
    W = Y @ torch.linalg.pinv(X)
    assert relative_error(W, W.mH) < 1e-12
    assert relative_error(W, wl.invsqrtm(wl.covariance(X))) < 1e-12


def test_cholesky_map_is_lower_triangular_and_pca_map_diagonalises():
    X = features_with([4.0, 1.0, 0.3], 20)
    L = wl.whiten(X, method="cholesky") @ torch.linalg.pinv(X)
    assert L.triu(1).abs().max() < 1e-12 and (L.diagonal() > 0).all()
    W = wl.whiten(X, method="pca") @ torch.linalg.pinv(X)
    # Rows are eigenvectors over √λ, in falling order: W P = Λ W on the right, and W Wᵀ = Λ^{-1}.
    assert relative_error(W @ W.mT, torch.diag(1 / torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64))) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_pca_does_not_depend_on_the_phase_that_lapack_chose(dtype):
    """The largest entry of each eigenvector is positive: another order of the samples gives the same map."""
    X = features_with([4.0, 1.0, 0.3], 20, dtype)
    Y = wl.whiten(X, method="pca")
    order = torch.randperm(20)
    assert relative_error(wl.whiten(X[:, order], method="pca"), Y[:, order]) < 1e-11


@pytest.mark.parametrize(
    ("method", "via"), [*((m, "covariance") for m in METHODS), ("zca", "factor"), ("cholesky", "factor")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("c", [1e-6, 1e-3, 7.0, 1e3, 1e6])
def test_a_relative_ridge_does_not_see_the_scale(method, via, dtype, c):
    """The relative ridge is in units of the mean eigenvalue."""
    X = features_with([2.0, 1.0, 0.1, 1e-3], 30, dtype)
    options = {"eps": 1e-4, "relative": True, "method": method, "via": via}
    Y = wl.whiten(X, **options)
    # κ(P + εI) ≤ 2.1/1.08e-3: scaling rounds every sample once.
    assert relative_error(wl.whiten(c * X, **options), Y) < 50 * 2e3 * eps_of(dtype)


@pytest.mark.parametrize("c", [1e-30, 1e-20, 1e18, 1e20, 1e30])
def test_a_relative_ridge_at_the_ends_of_single_precision_is_right_or_an_error(c):
    """(cX)² leaves the range of float32 long before cX does: a silent zero is the one answer that is not allowed."""
    X = features_with([2.0, 1.0, 0.5], 30)
    want = wl.whiten(X, eps=1e-3, relative=True)
    try:
        got = wl.whiten((c * X).float(), eps=1e-3, relative=True)
    except wl.NonFiniteMatrixError:
        assert c > 1e18
    else:
        assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_samples_than_channels_stay_finite_with_a_ridge(method, n):
    X = torch.randn(5, n, requires_grad=True)
    Y = wl.whiten(X, eps=1e-3, method=method)
    assert torch.isfinite(Y).all()
    (g,) = torch.autograd.grad(Y.square().sum() + Y.sum(), X)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_singular_covariance_without_a_ridge_is_refused(method, n):
    """The covariance of n ≤ d samples is singular (exactly, here): an error, and the same for each method."""
    X = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 0.0], [0.0, 0.0, 0.0]])[:, :n]
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"eps"):
        wl.whiten(X, method=method)


def test_whitening_on_the_range_alone():
    """rank='pinv': the covariance becomes the projection on the range."""
    X = features_with([3.0, 1.0, 0.0, 0.0], 4)
    P = wl.covariance(wl.whiten(X, rank="pinv"))
    assert relative_error(P @ P, P) < 1e-7 and abs(P.trace() - 2) < 1e-7


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_constant_and_zero_channels_stay_zero(method):
    X = torch.randn(4, 30, dtype=torch.float64)
    X[1], X[3] = 5.0, 0.0
    Y = wl.whiten(X, eps=1e-5, method=method)
    assert Y[[1, 3]].abs().max() < 1e-9


def test_relative_whitening_of_nothing_is_nothing():
    X = torch.zeros(3, 8, requires_grad=True)
    Y = wl.whiten(X, eps=1e-3, relative=True)
    assert torch.equal(Y, torch.zeros(3, 8))
    (g,) = torch.autograd.grad(Y.sum(), X)
    assert torch.isfinite(g).all()


def test_bad_arguments_name_themselves():
    X = torch.randn(3, 9)
    with pytest.raises(ValueError, match=r"unknown whitening method 'zac'; did you mean 'zca'"):
        wl.whiten(X, method="zac")
    with pytest.raises(ValueError, match=r"rank='pinv' .*zca.*cholesky"):
        wl.whiten(X, method="cholesky", rank="pinv")


@pytest.mark.parametrize("method", METHODS)
def test_the_solver_is_used_or_refused(method):
    """A solver that plays no part must not be swallowed."""
    X = features_with([2.0, 1.0, 0.5], 20)
    with pytest.raises(ValueError, match="solver"):
        wl.whiten(X, method=method, solver="nonsense")
    if method == "zca":
        damped = wl.whiten(X, solver=wl.NewtonSchulz(2, tolerance=None))
        assert relative_error(damped, wl.whiten(X)) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_whitening_matrix_of_what_is_not_symmetric_is_refused(method):
    with pytest.raises(wl.NotSymmetricError, match=r"5\.0e-01 of its largest entry"):
        wl.whitening_matrix(torch.tensor([[2.0, 1.0], [0.0, 2.0]]), method=method)
