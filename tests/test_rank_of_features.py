"""One rule for the rank of features: values, gradients, layers, whitening, monitor and condition numbers keep the same.

The truth is the singular value decomposition of the float32 features in 60 digits; a direction counts where its
singular value is above what rounding the features can make, eps ‖X‖_F (the one of Weyl: |σi(X + E) − σi(X)| ≤ ‖E‖).
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import wellcond.linalg as wl
from helpers import eps_of, relative_error
from wellcond.monitor import ConditionMonitor
from wellcond.nn import SpectralLayer

D, N = 24, 17


def features(exponent: float, d: int = D, n: int = N, offset: float = 0.0) -> torch.Tensor:
    """Float32 features with n − 1 singular values from 1 to 10^exponent, and a mean."""
    U = torch.linalg.qr(torch.randn(d, min(d, n - 1), dtype=torch.float64)).Q
    noise = torch.randn(n, min(d, n - 1), dtype=torch.float64)
    V = torch.linalg.qr(noise - noise.mean(0)).Q
    return ((U * torch.logspace(0, exponent, U.shape[1], dtype=torch.float64)) @ V.mT + offset).float()


def truth(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """U, σ, V of A = (X − mean)/√n in double precision from 60 digits, and how many σ are above eps ‖X‖_F/√n."""
    n = X.shape[1]
    with mpmath.workdps(60):
        M = mpmath.matrix(X.double().tolist())
        norm = mpmath.sqrt(sum(x * x for x in M))
        for i in range(M.rows):
            mean = mpmath.fsum(M[i, :]) / n
            for j in range(n):
                M[i, j] = (M[i, j] - mean) / mpmath.sqrt(n)
        wide = M if M.rows <= n else M.T
        U, S, V = mpmath.svd_r(wide)
        kept = sum(s > eps_of(torch.float32) * norm / mpmath.sqrt(n) for s in S)
        left, right = (torch.tensor(x.tolist(), dtype=torch.float64) for x in (U, V.T))
        sigma = torch.tensor([float(s) for s in S], dtype=torch.float64)
    U, V = (left, right) if M.rows <= n else (right, left)
    return U[:, :kept], sigma[:kept], V[:, :kept], kept


def root_gradient(X: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """2 [U (H ∘ R) + (I − U Uᵀ) G U] Vᵀ/√n over the range that counts, of the square root."""
    U, sigma, V, _ = truth(X)
    G = (G + G.mT) / 2
    H, R = U.mT @ G @ U, sigma / (sigma.unsqueeze(-1) + sigma)
    return 2 * (U @ (H * R) + G @ U - U @ H) @ V.mT / X.shape[1] ** 0.5


@pytest.mark.parametrize("exponent", [-2.0, -5.0, -6.5, -7.0, -8.0, -12.0])
@pytest.mark.parametrize(("d", "n"), [(D, N), (N, D), (12, 12)])
def test_everything_keeps_the_rank_that_the_rounding_of_the_features_permits(d, n, exponent):
    X = features(exponent, d, n)
    _, sigma, _, rank = truth(X)
    assert wl.numerical_rank(X, features=True) == wl.covariance_spectrum(X).numerical_rank == rank
    assert (wl.condition_number(X, features=True).item() == math.inf) == (rank < d)
    with ConditionMonitor(layer := SpectralLayer("sqrt"), every=1) as monitor:
        layer(X)
    assert monitor.records[0].numerical_rank == rank

    # Functions of the range alone show how large it is: whitened features are one there, and P⁻¹ has their trace.
    whitened = wl.whiten(X, rank="pinv", via="factor").double()
    assert whitened.square().sum().item() / n == pytest.approx(rank, rel=1e-4)
    inverse = wl.covariance_powm(X, -1.0, rank="pinv").double()
    # Its trace is Σ 1/σ², of which rounding the result leaves eps32, and the smallest σ² is known to 1e-4.
    assert inverse.trace().item() == pytest.approx(sigma.pow(-2).sum().item(), rel=2e-4)


@pytest.mark.parametrize("exponent", [-2.0, -5.0, -6.5, -7.0, -8.0, -12.0])
@pytest.mark.parametrize(("d", "n"), [(D, N), (N, D), (12, 12)])
def test_the_root_and_its_gradient_are_the_truth_by_every_road(d, n, exponent):
    """Its coefficients are bounded: what is left is the 1e-4 to which the least known direction is kept."""
    X, G = features(exponent, d, n), torch.randn(d, d)
    U, sigma, _, _ = truth(X)
    want = root_gradient(X, G.double())
    roads = {
        "sqrtm": lambda x: wl.covariance_sqrtm(x),
        "powm": lambda x: wl.covariance_powm(x, 0.5),
        "pinv": lambda x: wl.covariance_sqrtm(x, rank="pinv"),
        "layer sqrt": SpectralLayer("sqrt"),
        "layer power": SpectralLayer("power", exponent=0.5),
    }
    gradients = {}
    for name, road in roads.items():
        x = X.clone().requires_grad_()
        Q = road(x)
        assert relative_error(Q, (U * sigma) @ U.mT) < 10 * eps_of(torch.float32)
        gradients[name] = torch.autograd.grad(Q, x, G)[0]
        assert relative_error(gradients[name], want) < 1e-4
    assert all(torch.equal(gradients["sqrtm"], gradients[name]) for name in roads if name != "pinv")


def test_the_case_of_the_issue():
    """64 × 49, singular values logspace(0, −7, 48): rank 46."""
    X = features(-7.0, 64, 49)
    assert wl.numerical_rank(X) == 46
    for f in (lambda x: wl.covariance_powm(x, -0.5, rank="pinv"), lambda x: wl.covariance_logm(x, rank="pinv")):
        eigvals = torch.linalg.eigvalsh(f(X).double())
        assert (eigvals.abs() > 1e-3 * eigvals.abs().max() * 1e-4).sum() == 46
    assert torch.linalg.matrix_rank(wl.whiten(X, rank="pinv", via="factor").double(), rtol=0.5) == 46


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "n"), [(6, 40), (40, 6), (7, 7), (4, 1)])
def test_a_mean_makes_the_rounding_larger_and_a_constant_has_rank_zero(d, n, dtype):
    X = torch.randn(d, n, dtype=dtype)
    full = min(d, n - 1)
    assert wl.numerical_rank(X, features=True) == full
    assert wl.numerical_rank(X / 100 + 10 / eps_of(dtype), features=True) == 0
    for constant in (0.1, 7.7):
        still = torch.full((d, n), constant, dtype=dtype).requires_grad_()
        Q = wl.covariance_sqrtm(still)
        (g,) = torch.autograd.grad(Q.sum(), still, create_graph=True)
        assert wl.numerical_rank(still, features=True) == 0
        assert Q.abs().max() == 0 and g.abs().max() == 0
        (h,) = torch.autograd.grad(g.sum(), still)
        assert torch.isfinite(h).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "n"), [(3, 3), (4, 4), (4, 3), (3, 5)])
def test_second_derivatives_of_the_root_where_the_null_direction_turns(d, n, dtype):
    """Centred features have n − 1 directions, so for n ≤ d the null space of P turns with them. The truth: a factor of
    n − 1 columns, Q = A (AᵀA)^{-1/2} Aᵀ, by autograd through the eigendecomposition of a regular matrix."""
    X, G, E = torch.randn(d, n, dtype=dtype), torch.randn(d, d, dtype=dtype), torch.randn(d, n, dtype=dtype)
    basis = torch.linalg.qr(torch.eye(n, dtype=torch.float64) - 1 / n)[0][:, : n - 1]

    def reduced(x):
        A = x @ basis / n**0.5
        M = A.mT @ A if n <= d else A @ A.mT
        eigvals, V = torch.linalg.eigh(M)
        if n <= d:
            return A @ (V * eigvals.rsqrt()) @ V.mT @ A.mT
        return (V * eigvals.sqrt()) @ V.mT

    def hessian_times(f, x, g, e):
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad((f(x) * g).sum(), x, create_graph=True)
        return torch.autograd.grad((grad * e).sum(), x)[0]

    want = hessian_times(reduced, X.double(), G.double(), E.double())
    for f in (wl.covariance_sqrtm, lambda x: wl.covariance_powm(x, 0.5), lambda x: wl.covariance_sqrtm(x, rank="pinv")):
        # Divided by the smallest σ twice.
        assert relative_error(hessian_times(f, X.clone(), G, E), want) < 1e4 * eps_of(dtype)


def test_forward_mode_of_the_root_is_bounded_too():
    """⟨G, dQ⟩ is what the gradient says, at singular values down to 1e-9."""
    U, V = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0], torch.randn(4, 4, dtype=torch.float64)
    V = torch.linalg.qr(V - V.mean(0))[0][:, :3]
    X = (U * torch.tensor([1.0, 1e-4, 1e-9], dtype=torch.float64)) @ V.mT
    dX, G = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    for f, bound in ((wl.covariance_sqrtm, 1e-6), (lambda x: wl.covariance_logm(x, eps=1e-18), 1e-4)):
        _, along = torch.func.jvp(f, (X,), (dX,))
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x), x, G)
        assert (along * G).sum().item() == pytest.approx((gradient * dX).sum().item(), rel=bound)


@pytest.mark.parametrize("scale", [1e160, 1e-170])
@pytest.mark.parametrize(("d", "n"), [(4, 9), (6, 3)])
def test_double_features_of_any_scale(d, n, scale):
    X = torch.randn(d, n, dtype=torch.float64)
    x, y = (X * scale).requires_grad_(), X.clone().requires_grad_()
    Q, want = wl.covariance_sqrtm(x), wl.covariance_sqrtm(y)
    assert relative_error(Q / scale, want) < 1e-14
    G = torch.randn(d, d, dtype=torch.float64)
    got, right = torch.autograd.grad(Q, x, G)[0], torch.autograd.grad(want, y, G)[0]
    assert relative_error(got, right) < 1e-12
    assert relative_error(wl.whiten(x, rank="pinv"), wl.whiten(y, rank="pinv")) < 1e-12
    if scale > 1:
        with pytest.raises(wl.NonFiniteMatrixError, match="squares are infinite"):
            wl.covariance_logm(x, eps=1.0)


def test_a_constant_is_not_whitened():
    assert wl.whiten(torch.full((4, 9), 0.1), rank="pinv").abs().max() == 0


def test_refusals_are_by_the_same_rule():
    X = features(-5.0, N, D)
    wl.covariance_powm(X, -0.5)
    wl.covariance_sqrtm(X, rank="raise")
    wl.whiten(X, via="factor")
    for beyond in (features(-8.0, N, D), features(-5.0, D, N)):
        for call in (
            lambda x: wl.covariance_powm(x, -0.5),
            lambda x: wl.covariance_logm(x),
            lambda x: wl.covariance_sqrtm(x, rank="raise"),
            lambda x: wl.whiten(x, via="factor"),
            lambda x: wl.whiten(x, via="factor", method="cholesky"),
        ):
            with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular up to rounding"):
                call(beyond)
