"""Values and first derivatives against mpmath at 50 digits, within the error bounds that the documentation states.

The bounds (the matrix A is taken exactly as rounded, so that only the library's own rounding counts; κ is its
condition number):
a backward stable root is the exact root of a matrix perturbed by a few eps·‖A‖ (Higham 2002, ch. 3), which a square
root turns into eps·√κ, an inverse square root into eps·κ, and a gradient into √κ times more of each. 10 is the few.
"""

from __future__ import annotations

from functools import partial

import mpmath
import pytest
import torch

import wellcond.linalg as wl
from helpers import (
    eps_of,
    features_with,
    geometric,
    hermitian_part,
    mp_derivative,
    mp_eigh,
    mp_function,
    relative_error,
    unitary,
    with_spectrum,
)

HALF, MINUS_HALF = mpmath.mpf(1) / 2, -mpmath.mpf(1) / 2
D = 6
RANGE = [
    *((dtype, kappa) for dtype in (torch.float32, torch.complex64) for kappa in (1.0, 1e2, 1e4, 1e5, 6e5)),
    *((dtype, kappa) for dtype in (torch.float64, torch.complex128) for kappa in (1.0, 1e4, 1e8, 1e12, 3e14)),
]
"""Up to half of 1/(d eps), beyond which a matrix is singular in its dtype (test_singular_matrices.py)."""


def positive_definite(kappa: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A matrix of condition number near κ as rounded to ``dtype``, and the κ that it really has.

    Rounding moves the smallest eigenvalue by about eps; the first draw that leaves it half of its value is taken.
    """
    for _ in range(200):
        P = with_spectrum(geometric(D, kappa), dtype)
        values, _ = mp_eigh(P)
        if values[0] > 0.5 / kappa:
            return P, float(values[-1] / values[0])
    raise AssertionError(f"no positive definite draw at κ = {kappa} in {dtype}")


@pytest.mark.parametrize(("dtype", "kappa"), RANGE)
def test_roots_are_within_the_documented_error(dtype, kappa):
    P, actual = positive_definite(kappa, dtype)
    eps = eps_of(dtype)
    Q, S = wl.sqrtm_invsqrtm(P)
    root = mp_function(P, mpmath.sqrt)
    inverse = mp_function(P, lambda x: 1 / mpmath.sqrt(x))
    for got in (Q, wl.sqrtm(P)):
        assert relative_error(got, root) <= 10 * eps * actual**0.5
    for got in (S, wl.invsqrtm(P)):
        assert relative_error(got, inverse) <= 10 * eps * actual


@pytest.mark.parametrize(("dtype", "kappa"), RANGE)
def test_gradients_of_the_roots_are_within_the_documented_error(dtype, kappa):
    P, actual = positive_definite(kappa, dtype)
    G = hermitian_part(torch.randn(D, D, dtype=dtype))
    for f, scalar, power in ((wl.sqrtm, mpmath.sqrt, 1.0), (wl.invsqrtm, lambda x: 1 / mpmath.sqrt(x), 1.5)):
        tracked = P.clone().requires_grad_()
        (got,) = torch.autograd.grad(f(tracked), tracked, G)
        assert torch.isfinite(got).all()
        assert relative_error(got, mp_derivative(P, G, scalar)) <= 10 * eps_of(dtype) * actual**power


@pytest.mark.parametrize(
    ("solver", "d", "kappa"),
    [
        *(("minimax", d, kappa) for d in (64, 256) for kappa in (1e2, 1e4, 1e6, 1e7)),
        *(("eigh", d, kappa) for d in (64, 256) for kappa in (1e2, 1e4, 0.8 / (d * eps_of(torch.float32)))),
    ],
)
def test_single_precision_keeps_its_promise_at_the_sizes_of_layers(d, kappa, solver):
    """The same bounds at d = 64 and 256, by double precision on the matrix as rounded (κ eps64 ≤ 2e-9).

    The matmul-only solver keeps them too, as far as it was told to go. The divided differences are those of s = √λ. A
    bound above 1 would let zero pass.
    """
    solver = wl.Minimax(kappa=2 * kappa, tolerance=None) if solver == "minimax" else solver
    P = with_spectrum(geometric(d, kappa), torch.float32)
    eigvals, U = torch.linalg.eigh(P.double())
    assert eigvals[0] > 0
    actual = (eigvals[-1] / eigvals[0]).item()
    s, G = eigvals.sqrt(), hermitian_part(torch.randn(d, d))
    K = 1 / (s[:, None] + s[None])
    for f, power, differences in ((wl.sqrtm, 0.5, K), (wl.invsqrtm, -0.5, -K / (s[:, None] * s[None]))):
        tracked = P.clone().requires_grad_()
        out = f(tracked, solver=solver)
        (g,) = torch.autograd.grad(out, tracked, G)
        bound = 10 * eps_of(torch.float32) * actual ** (0.5 if power > 0 else 1.0)
        assert relative_error(out, (U * s.pow(2 * power)) @ U.mT) <= min(bound, 0.9)
        truth = U @ (differences * (U.mT @ G.double() @ U)) @ U.mT
        assert relative_error(g, truth) <= min(bound * actual**0.5, 0.9)


@pytest.mark.parametrize(("dtype", "kappa"), [r for r in RANGE if r[1] <= 1e8])
@pytest.mark.parametrize("exponent", [-1.5, -0.5, 0.25, 0.5, 2.0])
def test_powers_match_mpmath(dtype, kappa, exponent):
    P, actual = positive_definite(kappa, dtype)
    truth = mp_function(P, lambda x: x ** mpmath.mpf(exponent))
    # x^p: a relative change δλ/λ ≤ eps·κ of the smallest eigenvalue weighs κ^{−p} against the largest.
    worst = max(actual ** (1 - exponent), 1.0) if exponent > 0 else actual
    assert relative_error(wl.powm(P, exponent), truth) <= 10 * D * eps_of(dtype) * max(worst, 1.0)


@pytest.mark.parametrize(("dtype", "kappa"), [r for r in RANGE if r[1] <= 1e8])
def test_logarithm_and_exponential_match_mpmath(dtype, kappa):
    P, actual = positive_definite(kappa, dtype)
    # d log λ = dλ/λ: eps·κ absolute, on values up to log κ.
    bound = 10 * D * eps_of(dtype)
    log = mp_function(P, mpmath.log)
    # For P = I the logarithm vanishes: the error is absolute there.
    assert (wl.logm(P).to(log.dtype) - log).norm() <= bound * actual * max(1.0, log.norm().item())
    H = hermitian_part(4 * torch.randn(D, D, dtype=dtype))
    # The condition number of exp at a Hermitian matrix is its norm (Higham 2008, ch. 10).
    norm = torch.linalg.matrix_norm(H, 2).item()
    assert relative_error(wl.expm(H), mp_function(H, mpmath.exp)) <= bound * max(norm, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("gap", [1e-3, 1e-7, 1e-10, 1e-13])
def test_derivatives_keep_their_digits_when_eigenvalues_nearly_meet(dtype, gap):
    """The divided differences lose nothing as λi → λj: neither the plain quotient nor the derivative would do."""
    P = with_spectrum([2.0, 2.0 - gap, 0.5, 0.5 + gap], dtype)
    G = hermitian_part(torch.randn(4, 4, dtype=dtype))
    functions = {
        "sqrt": (wl.sqrtm, mpmath.sqrt),
        "invsqrt": (wl.invsqrtm, lambda x: 1 / mpmath.sqrt(x)),
        "log": (wl.logm, mpmath.log),
        "exp": (wl.expm, mpmath.exp),
        "power": (partial(wl.powm, exponent=0.3), lambda x: x ** mpmath.mpf(0.3)),
        "inverse power": (partial(wl.powm, exponent=-1.7), lambda x: x ** mpmath.mpf(-1.7)),
    }
    for name, (f, scalar) in functions.items():
        tracked = P.clone().requires_grad_()
        (got,) = torch.autograd.grad(f(tracked), tracked, G)
        # κ = 4 and the functions are smooth on [½, 2]: a few eps times κ^{2.7}.
        assert relative_error(got, mp_derivative(P, G, scalar)) <= 10 * eps_of(dtype) * 4**2.7, name


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_positive_semidefinite_matrix_with_a_ridge_never_gives_nan(dtype, eps):
    """Zero, rank one, denormal, graded over the whole range of the dtype: values and gradients stay finite."""
    big = torch.finfo(dtype).max ** 0.25
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    vector = torch.randn(5, 1, dtype=dtype)
    matrices = {
        "zero": torch.zeros(5, 5, dtype=dtype),
        "negative zero": -torch.zeros(5, 5, dtype=dtype),
        "rank one": vector @ vector.mH,
        "denormal": torch.eye(5, dtype=dtype) * torch.finfo(dtype).tiny / 8,
        "graded": torch.diag(torch.tensor([big, 1.0, 1.0 / big, 0.0, 0.0], dtype=real)).to(dtype),
        "ones": torch.ones(5, 5, dtype=dtype),
    }
    for name, P in matrices.items():
        for f in (wl.sqrtm, wl.invsqrtm, wl.logm, partial(wl.powm, exponent=-0.3), partial(wl.powm, exponent=0.3)):
            tracked = P.clone().requires_grad_()
            out = f(tracked, eps=eps)
            assert torch.isfinite(out).all(), (name, f)
            (g,) = torch.autograd.grad(out.real.sum(), tracked)
            assert torch.isfinite(g).all(), (name, f)


@pytest.mark.parametrize("scale", [1e-38, 1e-36, 1e-24, 1e-19, 1e19, 1e24, 3e37])
@pytest.mark.parametrize("solver", [s for s in wl.SOLVERS if s != "svd"])
@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
def test_every_solver_scales_over_the_whole_range_of_single_precision(solver, scale):
    """The square of an entry beyond 1e19 is infinite, below 1e-23 it is zero: no norm may be formed of those.

    Each solver against itself in double precision at scale 1, where neither happens; a power beside the eigh.
    """
    P = with_spectrum([4.0, 2.0, 2.0, 1.0])
    scaled = hermitian_part((P * scale).float())
    functions = [(partial(wl.sqrtm, solver=solver), 0.5), (partial(wl.invsqrtm, solver=solver), -0.5)]
    for f, power in functions + [(partial(wl.powm, exponent=0.3), 0.3)] * (solver == "eigh"):
        exact, single = (scaled.double() / scale).requires_grad_(), scaled.clone().requires_grad_()
        want, got = f(exact), f(single)
        # Denormal entries (below 1.2e-38) keep an absolute 1.4e-45 only: at 1e-38 a relative 1e-7 still.
        # A linear solve adds eps times the condition number of its matrix: 50 eps at worst of 3,000 turned spectra.
        assert relative_error(got.double() / scale**power, want) < (60 if solver == "pade" else 20) * eps_of(
            torch.float32
        )
        if 1e-36 < scale ** (power - 1) < 1e36:
            (expected,) = torch.autograd.grad(want.sum(), exact)
            (g,) = torch.autograd.grad(got.sum(), single)
            bound = (40 if solver == "eigh" else 100) * eps_of(torch.float32)
            assert relative_error(g.double() / scale ** (power - 1), expected) < bound
    assert wl.sqrtm_ex(scaled, solver=solver).residual < 0.1


def test_entries_near_the_largest_float_do_not_overflow_in_symmetrising():
    """Every entry is finite, and so is the root: a sum of an entry and its mirror image must not be formed."""
    P = torch.diag(torch.tensor([2.0e38, 1.0e38, 3.0e38]))
    assert relative_error(wl.sqrtm(P), P.double().sqrt()) < 10 * eps_of(torch.float32)
    assert relative_error(wl.invsqrtm(P), torch.diag(P.diagonal().double().rsqrt())) < 10 * eps_of(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("d", "n"), [(1, 1), (3, 1), (3, 2), (4, 9), (2, 2**18)])
@pytest.mark.parametrize("correction", [0, 1])
def test_covariance_is_the_definition(dtype, d, n, correction):
    """eq. (2) in double precision, up to sizes where its n × n centring matrix would take 512 GB."""
    X = torch.randn(2, d, n, dtype=dtype) + 3
    if n <= correction:
        with pytest.raises(ValueError, match=r"1 sample .*correction=1 needs at least 2"):
            wl.covariance(X, correction=correction)
        return
    wide = X.to(torch.complex128 if dtype.is_complex else torch.float64)
    centred = wide - wide.mean(-1, keepdim=True)
    truth = centred @ centred.mH / (n - correction)
    got = wl.covariance(X, correction=correction)
    assert got.dtype == dtype and got.shape == (2, d, d)
    # The mean is off by eps·|mean|·log n and squares to nothing; the product by eps·√n at worst.
    assert (got.to(wide.dtype) - truth).abs().max() <= 10 * eps_of(dtype) * (n**0.5) * (1 + truth.abs().max())
    assert torch.equal(got, got.mH)
    # The diagonal of a Hermitian matrix is real, to the last bit.
    if dtype.is_complex:
        assert (got.diagonal(dim1=-2, dim2=-1).imag == 0).all()


def test_covariance_of_an_offset_far_larger_than_the_spread():
    """The mean is subtracted before squaring: E[x²] − E[x]² would lose everything here."""
    X = torch.randn(4, 4096, dtype=torch.float64)
    shifted = (X + 1e4).float()
    truth = wl.covariance(shifted.double())
    # Float32 samples near 1e4 are spaced 1e-3; their mean is off by at most that, which enters squared.
    assert relative_error(wl.covariance(shifted), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_lyapunov_solves_its_equation(dtype):
    Q = with_spectrum([3.0, 3.0, 1.0, 0.2], dtype)
    G = torch.randn(4, 4, dtype=dtype)
    X = wl.lyapunov(Q, G)
    assert relative_error(Q @ X + X @ Q, G) < 100 * eps_of(dtype)
    # A second algorithm: the Kronecker form of the equation.
    eye = torch.eye(4, dtype=dtype)
    direct = torch.linalg.solve(torch.kron(Q, eye) + torch.kron(eye, Q.mT.contiguous()), G.reshape(-1)).reshape(4, 4)
    assert relative_error(X, direct) < 100 * 15 * eps_of(dtype)


def test_lyapunov_of_an_indefinite_matrix_takes_the_least_norm_solution():
    """Pairs that sum to zero have no solution; the pseudo-inverse of the Kronecker form is the truth."""
    Q = torch.diag(torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    G = torch.randn(4, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    truth = (torch.linalg.pinv(torch.kron(Q, eye) + torch.kron(eye, Q)) @ G.reshape(-1)).reshape(4, 4)
    assert relative_error(wl.lyapunov(Q, G), truth) < 1e-13


def test_newton_schulz_with_many_steps_is_the_square_root():
    P = with_spectrum(geometric(5, 100.0), batch=(3,))
    Q, S = wl.sqrtm_invsqrtm(P, solver=wl.NewtonSchulz(steps=25))
    for i in range(3):
        assert relative_error(Q[i], mp_function(P[i], mpmath.sqrt)) < 1e-12
        assert relative_error(S[i], mp_function(P[i], lambda x: 1 / mpmath.sqrt(x))) < 1e-11


def test_adaptive_newton_schulz_takes_each_matrix_as_far_as_it_goes():
    """Beside one another: κ = 1, 1e2, 1e6, and a singular one, along whose null directions 60 fixed steps overflow."""
    spectra = ([1.0] * 6, geometric(6, 1e2), geometric(6, 1e6), (1.0, 0.5, 0.1, 0.0, 0.0, 0.0))
    for dtype in (torch.float32, torch.float64):
        P = torch.stack([with_spectrum(spectrum, dtype) for spectrum in spectra])
        Q = wl.sqrtm(P, solver=wl.NewtonSchulz(60, tolerance=None, adaptive=True))
        for matrix, root in zip(P[:3], Q[:3], strict=True):
            # Backward stable to a low multiple of eps: the root of a matrix that differs by that much in norm.
            truth, bound = mp_function(matrix.double(), mpmath.sqrt), 50 * eps_of(dtype)
            assert relative_error(root.double() @ root.double(), matrix.double()) < bound
            assert relative_error(root, truth) < bound * 1e6**0.5
        assert relative_error(Q[3] @ Q[3], P[3]) < 50 * eps_of(dtype)
        if dtype == torch.float32:
            singular = with_spectrum(spectra[3], dtype, (32,))
            assert not torch.isfinite(wl.sqrtm(singular, solver=wl.NewtonSchulz(60, tolerance=None))).all()
            assert torch.isfinite(wl.sqrtm(singular, solver=wl.NewtonSchulz(60, tolerance=None, adaptive=True))).all()


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
def test_adaptive_newton_schulz_stops_at_its_tolerance_and_differentiates_what_it_did():
    """The same as so many fixed steps, and a batch the same as its matrices one by one."""
    P = torch.stack([with_spectrum(geometric(5, kappa)) for kappa in (1.5, 1e2, 1e4)])
    G = torch.randn_like(P)
    eye = torch.eye(5, dtype=P.dtype)
    residuals = {
        wl.sqrtm: lambda A, Q: (Q @ Q - A).norm() / A.norm(),
        wl.invsqrtm: lambda A, S: (S @ A @ S - eye).norm() / eye.norm(),
    }
    steps = []
    for f, residual in residuals.items():
        A = P.clone().requires_grad_()
        out = f(A, solver=wl.NewtonSchulz(40, tolerance=1e-3, adaptive=True))
        (gradient,) = torch.autograd.grad(out, A, G)
        for i in range(3):
            fixed = [f(P[i], solver=wl.NewtonSchulz(k, tolerance=None)) for k in range(1, 40)]
            errors = [residual(P[i], one) for one in fixed]
            first = next(k for k, error in enumerate(errors) if error <= 1e-3)
            steps.append(first + 1)
            B = P[i].clone().requires_grad_()
            same = f(B, solver=wl.NewtonSchulz(first + 1, tolerance=None))
            assert relative_error(out[i], same) < 1e-12
            assert relative_error(gradient[i], torch.autograd.grad(same, B, G[i])[0]) < 1e-12
    assert steps[3] < steps[4] < steps[5]


def test_newton_schulz_is_the_published_iteration():
    """iSQRT-COV (Li et al. 2018, eq. 4–7), written out on the eigenvalues: every step acts on each of them alone."""
    P = with_spectrum([3.0, 1.0, 0.1])
    eigvals = torch.linalg.eigvalsh(P)
    for steps in (1, 3, 5):
        y, z = eigvals / eigvals.sum(), torch.ones_like(eigvals)
        for _ in range(steps):
            m = (3 - z * y) / 2
            y, z = y * m, m * z
        Q, S = wl.sqrtm_invsqrtm(P, solver=wl.NewtonSchulz(steps, tolerance=None))
        assert torch.allclose(torch.linalg.eigvalsh(Q), y * eigvals.sum().sqrt(), rtol=1e-12)
        assert torch.allclose(torch.linalg.eigvalsh(S), (z / eigvals.sum().sqrt()).sort().values, rtol=1e-12)


def test_newton_schulz_scales_each_matrix_by_itself():
    """One large matrix in the batch leaves the others as they are alone (mathematics.md, section 4)."""
    small, large = with_spectrum([2.0, 1.0, 0.5]), 1e6 * with_spectrum([1.0, 1.0, 1.0])
    together = wl.sqrtm(torch.stack([small, large]), solver="newton_schulz")
    assert relative_error(together[0], wl.sqrtm(small, solver="newton_schulz")) < 1e-14


@pytest.mark.parametrize("solver", ["auto", *wl.SOLVERS])
def test_every_solver_takes_the_zero_matrix(solver):
    """√0 = 0; with a ridge it is √ε I, and its inverse."""
    zero, eye = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert relative_error(wl.sqrtm(zero, eps=1e-4, solver=solver), 1e-2 * eye) < 1e-3
    assert relative_error(wl.invsqrtm(zero, eps=1e-4, solver=solver), 1e2 * eye) < 1e-2
    assert wl.sqrtm(zero, solver=solver).abs().max() < 1e-12


@pytest.mark.parametrize("solver", ["auto", "eigh", "svd"])
def test_decomposing_solvers_refuse_an_indefinite_matrix(solver):
    """Singular values have no sign: the root of |P| is not the root of P."""
    with pytest.raises(wl.NotPositiveSemidefiniteError, match="indefinite"):
        wl.sqrtm(torch.diag(torch.tensor([1.0, -0.5])), solver=solver)


@pytest.mark.parametrize("solver", ["auto", *wl.SOLVERS])
def test_the_pair_equals_the_two_alone(solver):
    P = with_spectrum([2.0, 1.0, 0.5], batch=(2,))
    Q, S = wl.sqrtm_invsqrtm(P, eps=0.1, solver=solver)
    assert relative_error(Q, wl.sqrtm(P, eps=0.1, solver=solver)) < 1e-13
    assert relative_error(S, wl.invsqrtm(P, eps=0.1, solver=solver)) < 1e-13


@pytest.mark.parametrize("d", [2, 3, 17])
def test_roots_of_unity_are_exact(d):
    """Projections are their own roots; scaled identities stay scaled identities."""
    U = unitary(d, max(d // 2, 1))
    projection = hermitian_part(U @ U.mH)
    # A null eigenvalue is off by eps·d, and its square root by √(eps·d).
    assert relative_error(wl.sqrtm(projection), projection) < 3 * (d * eps_of(torch.float64)) ** 0.5
    eye = torch.eye(d, dtype=torch.float64)
    assert torch.equal(wl.sqrtm(4 * eye), 2 * eye)
    assert torch.equal(wl.invsqrtm(4 * eye), eye / 2)
    assert relative_error(wl.expm(wl.logm(3 * eye)), 3 * eye) < 1e-15


def test_functions_of_a_covariance_agree_with_each_other():
    """Identities between functions that share no formula."""
    P = wl.covariance(features_with([3.0, 1.0, 0.5, 0.1], 9))
    Q, S = wl.sqrtm_invsqrtm(P)
    eye = torch.eye(4, dtype=torch.float64)
    assert relative_error(Q @ Q, P) < 1e-14
    assert relative_error(S @ P @ S, eye) < 1e-13
    assert relative_error(wl.expm(wl.logm(P) / 2), Q) < 1e-13
    assert relative_error(wl.powm(P, 0.25) @ wl.powm(P, 0.25), Q) < 1e-13
    assert relative_error(wl.powm(P, -1.0) @ P, eye) < 1e-13
    assert relative_error(wl.powm(P, 0.0), eye) < 1e-14
    assert relative_error(wl.expm(wl.logm(P)), torch.linalg.matrix_exp(wl.logm(P))) < 1e-13


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0])
def test_integer_powers_of_a_singular_matrix_have_every_derivative(exponent):
    """P⁰, P, P² and P³ are polynomials: the matrix product differentiates as far as one likes."""
    X = features_with([2.0, 1.0, 0.0, 0.0], 5)
    products = {
        0.0: lambda P: torch.eye(4, dtype=P.dtype) + 0 * P,
        1.0: lambda P: P,
        2.0: lambda P: P @ P,
        3.0: lambda P: P @ P @ P,
    }
    W = hermitian_part(torch.randn(4, 4, dtype=torch.float64))

    def curvature(f):
        P = hermitian_part(X @ X.mH / 5).requires_grad_()
        (g,) = torch.autograd.grad((f(P) * W).sum(), P, create_graph=True)
        h = torch.autograd.grad((g * W).sum(), P, allow_unused=True)[0] if g.requires_grad else None
        return g, torch.zeros_like(g) if h is None else h

    for got, want in zip(curvature(lambda P: wl.powm(P, exponent)), curvature(products[exponent]), strict=True):
        assert torch.isfinite(got).all()
        assert (got - hermitian_part(want)).abs().max() < 1e-12 * (1 + want.abs().max())


@pytest.mark.skipif(not hasattr(torch.linalg, "matrix_sqrth"), reason="torch.linalg.matrix_sqrth is new in torch 2.14")
def test_sqrtm_equals_torch():
    P = with_spectrum(geometric(5, 1e4))
    assert relative_error(wl.sqrtm(P), torch.linalg.matrix_sqrth(P)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expm_takes_an_asymmetry_that_is_rounding_beside_the_identity(dtype):
    """exp(S) = I + S + …; the loop for a Karcher mean (Moakher 2005) ends in S of pure rounding."""
    S = torch.tensor([[0.0, 1e-17], [0.0, 0.0]], dtype=dtype)
    assert (wl.expm(S) - torch.eye(2, dtype=dtype)).abs().max() < 2 * eps_of(dtype)
    with pytest.raises(wl.NotSymmetricError):
        wl.expm(torch.tensor([[0.0, 1e-2], [0.0, 0.0]], dtype=dtype))
    P = torch.stack([with_spectrum([3.0, 1.0, 0.2], dtype) for _ in range(5)])
    M = P.mean(0)
    for _ in range(40):
        root, inverse = wl.sqrtm_invsqrtm(M)
        step = wl.logm(inverse @ P @ inverse).mean(0)
        M = root @ wl.expm(step) @ root
    # The gradient of the sum of squared distances vanishes at the mean.
    assert step.abs().max() < 50 * eps_of(dtype)


def test_in_double_precision_minimax_stays_close_beyond_the_condition_number_it_was_made_for():
    eigvals = geometric(8, 1e8)
    P = with_spectrum(eigvals)
    exact = wl.Eigh()
    for function, bound in ((wl.sqrtm, 1e-9), (wl.invsqrtm, 1e-5)):
        error = (function(P, solver="minimax") - function(P, solver=exact)).norm() / function(P, solver=exact).norm()
        assert error < bound
