"""Three figures that are never mixed: κ(P), κ(P + εI) and the effective rank, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

import wellcond.linalg as wl
from helpers import eps_of, features_with, geometric, relative_error, with_spectrum


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e6, 1e10, 1e14, 1e20, 1e24])
def test_features_resolve_the_square_of_what_the_covariance_can(kappa, dtype):
    """κ(P) = (σ1/σd)² from the singular values of A: 1/eps² is within reach, where the covariance ends at 1/eps."""
    X = features_with(geometric(4, kappa), 12, dtype)
    got = wl.condition_number(X, features=True).item()
    # σd is off by eps·σ1 (rounding of the features themselves): relatively eps·√κ, twice for the square. While the Gram
    # matrix knows every eigenvalue to 1 % the figures come from it, off by 4√d eps of the largest eigenvalue.
    by_gram = 4 * 4**0.5 * eps_of(dtype) * kappa
    rel = 40 * eps_of(dtype) * kappa**0.5 if by_gram > 0.01 else 5 * max(by_gram, eps_of(dtype))
    assert got == pytest.approx(kappa, rel=rel)


def test_covariances_give_the_ratio_of_their_extreme_eigenvalues():
    assert wl.condition_number(with_spectrum([5.0, 2.0, 0.01])).item() == pytest.approx(500.0, rel=1e-11)
    assert wl.condition_number(with_spectrum([5.0, 2.0, 0.01], torch.float32)).item() == pytest.approx(500.0, rel=1e-3)


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 3.0])
def test_with_epsilon_it_is_that_of_what_the_solver_sees(eps):
    P = with_spectrum([5.0, 2.0, 0.01])
    assert wl.condition_number(P, eps=eps).item() == pytest.approx((5 + eps) / (0.01 + eps), rel=1e-11)
    X = features_with([5.0, 2.0, 0.01], 9)
    assert wl.condition_number(X, eps=eps).item() == pytest.approx((5 + eps) / (0.01 + eps), rel=1e-11)
    deficient = features_with([5.0, 2.0, 0.0], 9)
    assert wl.condition_number(deficient, eps=eps).item() == pytest.approx((5 + eps) / eps, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("d", "n"), [(64, 49), (16, 16), (5, 2), (3, 1)])
def test_too_few_samples_are_infinite_and_not_some_rounding_figure(d, n, dtype):
    X = torch.randn(d, n, dtype=dtype)
    assert wl.condition_number(X, features=True).item() == math.inf
    assert wl.numerical_rank(X, features=True).item() == n - 1
    spectrum = wl.spectrum(X, features=True)
    assert spectrum.eigvals.shape == (d,)
    if n > 1:
        assert math.isfinite(spectrum.range_condition_number().item())


def test_a_convolution_from_three_channels_has_rank_27():
    """mathematics.md, section 5: 64 output channels of a 3 × 3 convolution from 3, whatever the number of samples."""
    conv = torch.nn.Conv2d(3, 64, 3)
    with torch.no_grad():
        X = conv(torch.randn(4, 3, 16, 16)).transpose(0, 1).flatten(1)
    assert wl.numerical_rank(X).item() == 27
    assert wl.condition_number(X).item() == math.inf
    truth = torch.linalg.svdvals((X - X.mean(-1, keepdim=True)).double())[:27]
    assert wl.spectrum(X).range_condition_number().item() == pytest.approx((truth[0] / truth[-1]).item() ** 2, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e20, 1e150])
def test_effective_rank_counts_directions_and_ignores_scale(scale):
    for k in (1, 2, 5):
        P = scale * torch.diag(torch.tensor([1.0] * k + [0.0] * (5 - k), dtype=torch.float64))
        assert wl.effective_rank(P).item() == pytest.approx(k)
    values = [4.0, 2.0, 1.0]
    expected = sum(values) ** 2 / sum(v * v for v in values)
    assert wl.effective_rank(scale * with_spectrum(values)).item() == pytest.approx(expected)


def test_single_precision_features_of_tiny_scale_keep_their_figures():
    X = features_with([4.0, 2.0, 1.0], 9)
    for scale in (1e-30, 1e30):
        small = (X * scale).float()
        assert wl.condition_number(small).item() == pytest.approx(4.0, rel=1e-5)
        assert wl.effective_rank(small).item() == pytest.approx(49 / 21, rel=1e-5)
        assert wl.numerical_rank(small).item() == 3


def test_a_zero_covariance():
    for X_or_P in (torch.zeros(4, 4), torch.ones(4, 9)):
        assert wl.condition_number(X_or_P).item() == math.inf
        assert wl.effective_rank(X_or_P).item() == 0.0
        assert wl.numerical_rank(X_or_P).item() == 0
        assert wl.condition_number(X_or_P, eps=1e-3).item() == 1.0


def test_square_features_are_told_from_covariances():
    X = torch.randn(6, 6, dtype=torch.float64)
    A = X - X.mean(-1, keepdim=True)
    sigma = torch.linalg.svdvals(A)
    assert wl.condition_number(X, eps=0.1).item() == pytest.approx(
        ((sigma[0] ** 2 / 6 + 0.1) / (sigma[-1] ** 2 / 6 + 0.1)).item()
    )
    P = wl.covariance(torch.randn(6, 20))
    assert wl.condition_number(P).item() == pytest.approx(torch.linalg.cond(P.double()).item(), rel=1e-4)
    # A symmetric feature matrix can only be told by the caller.
    S = with_spectrum([3.0, 2.0, 1.0])
    assert wl.condition_number(S, features=True) != wl.condition_number(S, features=False)


def test_batches_equal_a_loop_and_may_be_empty():
    X = torch.randn(2, 3, 5, 40)
    X[1, 2] = 0
    for f in (wl.condition_number, wl.effective_rank, wl.numerical_rank):
        batch = f(X)
        assert batch.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                assert batch[i, j].item() == pytest.approx(f(X[i, j]).item(), rel=1e-9)
        assert f(X[:0]).shape == (0, 3)


def test_matrices_without_rows_have_no_condition_number():
    for f in (wl.condition_number, wl.effective_rank, wl.numerical_rank):
        with pytest.raises(ValueError, match=r"\(0, 0\)"):
            f(torch.zeros(0, 0))


def test_figures_are_detached_and_in_double_precision():
    X = torch.randn(4, 20, requires_grad=True)
    for f in (wl.condition_number, wl.effective_rank):
        out = f(X)
        assert out.dtype == torch.float64 and not out.requires_grad
    assert wl.numerical_rank(X).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_measured(dtype):
    X = features_with([1.0, 0.5, 0.25], 64).to(dtype)
    # The entries are rounded to 2⁻⁸ or 2⁻¹¹: figures of the rounded features in double precision are the truth.
    assert wl.condition_number(X).item() == pytest.approx(wl.condition_number(X.double()).item())


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match=r"eps must be a finite number >= 0, got -1"):
        wl.condition_number(torch.eye(2), eps=-1.0)
    with pytest.raises(wl.NonFiniteMatrixError, match=r"NaN"):
        wl.condition_number(torch.full((2, 5), float("nan")))
    with pytest.raises(TypeError, match=r"X_or_P.*int64"):
        wl.condition_number(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"square.*\(2, 5\)"):
        wl.condition_number(torch.randn(2, 5), features=False)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-157, 1e155, 1e300])
def test_double_features_of_any_size_have_the_numbers_of_their_unit(scale):
    """Squares beyond 1e154 or below 1e-154 are not representable; the ratios of eigenvalues are."""
    X = torch.randn(3, 4, 50, dtype=torch.float64)
    for f in (wl.condition_number, wl.effective_rank, wl.numerical_rank):
        assert relative_error(f(scale * X).double(), f(X).double()) < 1e-12
    if 1e-160 < scale < 1e153:  # where ε can be given in that unit at all
        assert (
            relative_error(wl.condition_number(scale * X, eps=1e-2 * scale * scale), wl.condition_number(X, eps=1e-2))
            < 1e-6
        )
    assert relative_error(wl.condition_number(1e-300 * X, eps=1.0), torch.ones(3, dtype=torch.float64)) == 0.0
