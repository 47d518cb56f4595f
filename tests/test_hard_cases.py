"""No NaN and no infinity for any positive semidefinite input, zero among them, by any solver, as long as ε > 0.

Hypothesis draws the spectrum (repeated, null, graded), the scale, the dtype and the function; the value, the gradient
and their bounds are checked. ε is taken in units of the largest eigenvalue, or alone for the zero matrix.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import wellcond.linalg as wl
from function_table import FUNCTIONS, OF_FEATURES, OF_MATRICES
from helpers import as_tuple, eps_of, features_with, hermitian_part, with_spectrum

# Eq. (7) of the paper's solver, and PCA, divide by λi − λj: infinite at ties, which is what the first is kept to show.
MATRIX = {
    **{n: OF_MATRICES[n] for n in ("sqrtm_ex", "invsqrtm_ex", "powm", "logm", "whitening_matrix")},
    **{n: FUNCTIONS[n].f for n in ("powm-minus1", "whitening_matrix-cholesky")},
    **{
        f"{name}-{solver}": partial(OF_MATRICES[name], solver=solver)
        for name in ("sqrtm", "invsqrtm", "sqrtm_invsqrtm")
        for solver in wl.SOLVERS
        if solver != "svd"
    },
}
FEATURES = {
    **{n: OF_FEATURES[n] for n in ("covariance_logm", "covariance_powm", "covariance_powm-minus1")},
    **{n: OF_FEATURES[n] for n in ("whiten-cholesky", "whiten-factor", "whiten-cholesky-factor")},
    "whiten-covariance": partial(wl.whiten, via="covariance"),
}
NO_RIDGE = {
    "covariance_sqrtm": wl.covariance_sqrtm,
    "polar": wl.polar,
    "polar-minimax": lambda X: wl.polar(X.detach(), solver="minimax") + 0 * X,
}
DTYPES = [torch.float32, torch.float64, torch.complex64]
SPECTRA = st.one_of(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=5),
    st.lists(st.floats(-15.0, 0.0).map(lambda x: 10.0**x), min_size=1, max_size=5),
    st.integers(1, 5).map(lambda d: [0.0] * d),
    st.integers(1, 5).map(lambda d: [1.0] * d),
)
EXPONENT = st.floats(-1.0, 1.0)


def finite_with_its_gradient(f, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    outs = as_tuple(f(x))
    assert all(torch.isfinite(out).all() for out in outs)
    (g,) = torch.autograd.grad(outs, x, [torch.ones_like(out) for out in outs])
    assert torch.isfinite(g).all()


def scale_of(dtype: torch.dtype, exponent: float) -> float:
    """From 1e-30 to 1e30 in double precision, from 1e-18 to 1e18 in single."""
    return 10.0 ** (exponent * (30 if dtype == torch.float64 else 18))


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.parametrize("name", MATRIX)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(spectrum=SPECTRA, exponent=EXPONENT, dtype=st.sampled_from(DTYPES), ridge=st.sampled_from([1e-2, 1e-5, 1e-7]))
def test_functions_of_a_positive_semidefinite_matrix_are_finite(name, spectrum, exponent, dtype, ridge):
    torch.manual_seed(len(spectrum))
    scale = scale_of(dtype, exponent)
    P = hermitian_part(with_spectrum([scale * v for v in spectrum], dtype))
    eps = ridge * scale * max(spectrum) or ridge
    # The derivative of λ^p at ε has to be a number of the dtype.
    power = 2.0 if name == "powm-minus1" else 1.5
    assume(eps**-power < torch.finfo(dtype).max / 100)
    finite_with_its_gradient(partial(MATRIX[name], eps=eps), P)


@pytest.mark.parametrize("name", FEATURES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    spectrum=SPECTRA,
    samples=st.integers(1, 7),
    exponent=EXPONENT,
    dtype=st.sampled_from(DTYPES),
    ridge=st.sampled_from([1e-2, 1e-5]),
)
def test_functions_of_features_are_finite(name, spectrum, samples, exponent, dtype, ridge):
    """One sample, dead channels, fewer samples than channels; the covariance has the square of the scale."""
    torch.manual_seed(len(spectrum))
    root = scale_of(dtype, exponent / 2)
    rank = min(len(spectrum), samples - 1)
    kept = [root**2 * v for v in spectrum[:rank]] + [0.0] * (len(spectrum) - rank)
    X = features_with(kept, samples, dtype)
    finite_with_its_gradient(partial(FEATURES[name], eps=ridge * max(kept) or ridge), X)


@pytest.mark.parametrize("name", NO_RIDGE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(spectrum=SPECTRA, samples=st.integers(1, 7), exponent=EXPONENT, dtype=st.sampled_from(DTYPES))
def test_the_factor_form_and_the_polar_factor_are_finite_without_a_ridge(name, spectrum, samples, exponent, dtype):
    torch.manual_seed(len(spectrum))
    root = scale_of(dtype, exponent)
    rank = min(len(spectrum), samples - 1)
    kept = spectrum[:rank] + [0.0] * (len(spectrum) - rank)
    finite_with_its_gradient(NO_RIDGE[name], root * features_with(kept, samples, dtype))


@pytest.mark.parametrize("solver", wl.SOLVERS)
@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(spectrum=SPECTRA, exponent=EXPONENT, dtype=st.sampled_from(DTYPES))
def test_square_roots_need_no_ridge(solver, spectrum, exponent, dtype):
    """Values only: the derivative at a null eigenvalue does not exist, and 1/(2√λ) of rounding is what it is."""
    torch.manual_seed(len(spectrum))
    scale = scale_of(dtype, exponent)
    P = hermitian_part(with_spectrum([scale * v for v in spectrum], dtype))
    Q = wl.sqrtm(P, solver=solver)
    assert torch.isfinite(Q).all()
    # No eigenvalue of the root above that of the matrix: 2 % is what the approximate solvers are over by.
    largest = (max(spectrum) * scale) ** 0.5
    assert torch.linalg.matrix_norm(Q, 2) <= 1.02 * largest + 10 * eps_of(dtype) * largest


@pytest.mark.parametrize("solver", ["eigh", "minimax", "newton_schulz"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", [(1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 0.5, 0.5), (0.7,)])
def test_gradients_at_a_scaled_repeated_spectrum_scale_with_it(solver, dtype, spectrum):
    """d√(cP) = dP/√c: at both ends of the range of single precision, where λi² − λj² would overflow."""
    base = with_spectrum(spectrum, torch.float64)
    if dtype.is_complex:
        base = base.to(torch.complex128)
    for scale in (2.0**-60, 1.0, 2.0**60):
        x = (scale * base).to(dtype).requires_grad_()
        G = torch.eye(len(spectrum), dtype=dtype)
        (g,) = torch.autograd.grad(wl.sqrtm(x, solver=solver), x, G)
        # Along the identity the derivative is P^{-1/2}/2.
        eigvals, U = torch.linalg.eigh(base)
        truth = (U * eigvals.rsqrt() / 2) @ U.mH / scale**0.5
        error = (g.to(truth.dtype) - truth).norm() / truth.norm()
        assert error < (2e-2 if solver == "newton_schulz" else 50 * eps_of(dtype))


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("d", "n"), [(64, 20), (64, 64), (256, 49)])
def test_products_alone_survive_a_rank_deficient_covariance(d, n, scale):
    """Rounding leaves eigenvalues of −1e-8: polynomials that carry 1e-6 to 1 would carry those to −∞.

    κ is 1/eps as far as single precision goes, so 10 eps √κ = 10 √eps is the documented error.
    """
    X = torch.randn(d, n)
    X[: d // 4] = 0.0
    P = wl.covariance(scale * X)
    eigvals, U = torch.linalg.eigh(P.double())
    truth = (U * eigvals.clamp_min(0.0).sqrt()) @ U.mT
    error = (wl.sqrtm(P, solver="minimax") - truth).norm() / truth.norm()
    assert error < 10 * eps_of(torch.float32) ** 0.5
