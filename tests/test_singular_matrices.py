"""A numerically singular matrix is treated in one way, wherever rounding has put its zero eigenvalues.

The band is d·eps of the largest eigenvalue (Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3), on
either side of zero. What needs the inverse refuses the whole band; the derivative of a root takes it for zero.
"""

import pytest
import torch

import wellcond.linalg as wl
from helpers import hermitian_part, relative_error, unitary, with_spectrum

REFUSING = {
    "invsqrtm": wl.invsqrtm,
    "sqrtm_invsqrtm": wl.sqrtm_invsqrtm,
    "invsqrtm-svd": lambda P: wl.invsqrtm(P, solver="svd"),
    "logm": wl.logm,
    "powm": lambda P: wl.powm(P, -1.0),
    "zca": wl.whitening_matrix,
    "pca": lambda P: wl.whitening_matrix(P, method="pca"),
    "cholesky": lambda P: wl.whitening_matrix(P, method="cholesky"),
}


def integer_gram(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Gram matrices of integers, exactly representable and exactly of rank 3 of 5."""
    F = torch.randint(-4, 5, (count, 5, 3))
    return (F @ F.mT).to(dtype)


def average_referenced(count: int, channels: int = 16, samples: int = 200) -> torch.Tensor:
    """Covariances of signals whose mean over the channels is removed, as of EEG: rank d − 1 up to rounding."""
    X = torch.randn(count, channels, samples, dtype=torch.float64)
    return wl.covariance(X - X.mean(1, keepdim=True))


@pytest.mark.parametrize("f", REFUSING.values(), ids=REFUSING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exactly_singular_matrix_is_refused_every_time(f, dtype):
    for P in integer_gram(50, dtype):
        with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
            f(P)


@pytest.mark.parametrize("f", REFUSING.values(), ids=REFUSING.keys())
def test_an_average_reference_is_refused_every_time(f):
    for P in average_referenced(20):
        with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
            f(P)


@pytest.mark.parametrize("f", REFUSING.values(), ids=REFUSING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_band_ends_at_d_eps_of_the_largest(f, dtype):
    """Diagonal, so that the eigenvalues are the entries to the last bit; and it is where numerical_rank sees it."""
    edge = 3.0 * 4 * torch.finfo(dtype).eps
    inside, outside = (torch.diag(torch.tensor([3.0, 2.0, 1.0, c * edge], dtype=dtype)) for c in (0.9, 1.1))
    assert [wl.numerical_rank(P).item() for P in (inside, outside)] == [3, 4]
    f(outside)
    with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
        f(inside)


def test_an_epsilon_or_a_policy_takes_them_all():
    P = average_referenced(20)
    truth = torch.linalg.pinv(P, hermitian=True, rtol=1e-12)
    assert relative_error(wl.powm(P, -1.0, rank="pinv"), truth) < 1e-10
    S = wl.invsqrtm(P, eps=1e-3)
    assert (
        relative_error(
            S @ (P + 1e-3 * torch.eye(16, dtype=P.dtype)) @ S, torch.eye(16, dtype=P.dtype).expand(20, 16, 16)
        )
        < 1e-10
    )


@pytest.mark.parametrize("draw", range(3))
def test_features_with_too_few_samples_have_no_whitening_without_epsilon(draw):
    """A few samples span a hyperplane at most; for average-referenced ones their number does not tell."""
    torch.manual_seed(draw)
    for method in ("zca", "pca", "cholesky"):
        for X in (torch.randn(4, 4), torch.randn(6, 4), torch.randn(4, 4, dtype=torch.complex64)):
            for via in ("covariance", "auto"):
                with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
                    wl.whiten(X, method=method, via=via)
        X = torch.randn(16, 200, dtype=torch.float64)
        with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
            wl.whiten(X - X.mean(0), method=method)


ROOTS = {
    "sqrtm": wl.sqrtm,
    "powm": lambda P: wl.powm(P, 0.5),
    "quarter": lambda P: wl.powm(P, 0.25),
}


@pytest.mark.parametrize("f", ROOTS.values(), ids=ROOTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_the_gradient_of_a_root_does_not_depend_on_where_rounding_put_the_zeros(f, dtype):
    """Rank 2 of 4: zeros that are exact, and the same matrix rotated, whose zeros are rounding of either sign."""
    flat = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=dtype))
    G = hermitian_part(torch.randn(4, 4, dtype=dtype))
    for _ in range(10):
        U = unitary(4, 4, dtype)
        gradients = []
        for P, g in ((flat, U.mH @ G @ U), (hermitian_part(U @ flat @ U.mH), G)):
            tracked = P.clone().requires_grad_()
            gradients.append(torch.autograd.grad(f(tracked), tracked, g)[0])
        # The range is known to eps of its gap; a null direction weighs 1/√λ ≤ 1, or λ^{-3/4} ≤ 1.
        assert relative_error(gradients[1], U @ gradients[0] @ U.mH) < 100 * torch.finfo(dtype).eps


def test_derivatives_of_every_order_take_the_band_for_zero():
    P = with_spectrum((2.0, 1.0, 0.0, 0.0), torch.float64)
    E, F = hermitian_part(torch.randn(4, 4, dtype=torch.float64)), torch.randn(4, 4, dtype=torch.float64)
    for f in ROOTS.values():
        tracked = P.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(tracked), tracked, E, create_graph=True)
        (second,) = torch.autograd.grad(first, tracked, F)
        # Without it: 1/√eps ≈ 1e8 in the first, eps^{-3/2} in the second.
        assert first.norm() < 10 * E.norm()
        assert second.norm() < 100 * E.norm() * F.norm()


def test_the_root_itself_is_not_cut():
    """Its value is backward stable: Q² is P to rounding, also where κ(P) is beyond 1/(d eps)."""
    P = with_spectrum([10.0**-k for k in range(8)], torch.float32)
    assert relative_error(wl.sqrtm(P) @ wl.sqrtm(P), P) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [0.1, 7.7, -2.3e5, 3.3e-4])
@pytest.mark.parametrize("samples", [49, 12345])
@pytest.mark.parametrize("options", [{}, {"relative": True}, {"method": "cholesky"}, {"via": "factor"}])
def test_the_rounding_of_a_mean_is_no_variance(value, samples, options):
    """A constant channel whitens to zero, alone and beside channels that vary."""
    X = torch.full((6, samples), value)
    assert wl.whiten(X, eps=1e-2, **options).abs().max() == 0.0
    X[:3] = torch.randn(3, samples)
    Y = wl.whiten(X, eps=1e-12, **options)
    assert Y[3:].abs().max() == 0.0
    assert relative_error(Y[:3], wl.whiten(X[:3], eps=1e-12, **options)) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
@pytest.mark.parametrize("via", ["covariance", "factor", "auto"])
@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_whitening_without_epsilon_does_not_see_the_unit(scale, via, method):
    X = torch.randn(5, 100)
    for options in ({}, {"relative": True}):
        assert (
            relative_error(wl.whiten(scale * X, via=via, method=method, **options), wl.whiten(X, method=method)) < 1e-4
        )
