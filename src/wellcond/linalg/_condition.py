"""Condition number and ranks of covariances, or of the covariance of features."""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import checks_values, require_finite, require_matrix, require_nonnegative
from wellcond._shared.precision import wide_dtype

from ._spectrum import Spectrum, covariance_spectrum, matrix_spectrum, require_entries


def spectrum(X_or_P: Tensor, *, features: bool | None = None) -> Spectrum:
    """The spectrum of the covariance of features, or of a covariance.

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        features: which of the two; ``None`` takes square Hermitian tensors for covariances, all others for features.

    Returns:
        A :class:`Spectrum`: (..., d) eigenvalues and (...,) tolerances in float64, detached; on the CPU for features,
        on the device of P for covariances.

    Raises:
        TypeError: X_or_P is not a floating or complex tensor.
        ValueError: fewer than two dimensions, no channel or sample, NaN or infinity, or, with ``features=False``, a
            matrix that is not Hermitian (both checked on the CPU by default).

    Complexity: that of :func:`covariance_spectrum`, or of :func:`matrix_spectrum`. Source: Golub and Van Loan, Matrix
    Computations, 4th ed., sect. 2.4.

    Example:
        >>> import torch
        >>> spectrum(torch.tensor([[1.0, -1.0], [0.0, 0.0]])).eigvals
        tensor([1., 0.], dtype=torch.float64)
    """
    found, unit = _spectrum_and_unit(X_or_P, features)
    if not isinstance(unit, Tensor):
        return found
    size = unit.square()
    return Spectrum(found.eigvals * size.unsqueeze(-1), found.tolerance * size)


def _spectrum_and_unit(X_or_P: Tensor, features: bool | None) -> tuple[Spectrum, Tensor | float]:
    """The spectrum in units of u², λ = u² eigvals, since squares of double-precision features beyond 1e154 or below
    1e-154 are not representable; what is computed from it are ratios."""
    require_matrix(X_or_P, "X_or_P")
    require_entries(X_or_P, "X_or_P")
    if features is None:
        square = X_or_P.shape[-1] == X_or_P.shape[-2]
        features = not (square and torch.allclose(X_or_P, X_or_P.mH, rtol=1e-3, atol=0.0, equal_nan=True))
    if not features:
        with torch.no_grad():
            return matrix_spectrum(X_or_P), 1.0
    X = X_or_P.detach()
    if checks_values(X):
        require_finite(X, "X_or_P")
    if X.dtype != wide_dtype(X):
        return covariance_spectrum(X), 1.0
    largest = X.abs().amax((-2, -1))
    unit = torch.where(((largest < 1e-100) | (largest > 1e100)) & (largest > 0), largest, 1.0)
    return covariance_spectrum(X / unit[..., None, None]), unit.cpu()


def condition_number(X_or_P: Tensor, *, eps: float = 0.0, features: bool | None = None) -> Tensor:
    """κ(P + εI) of covariances or of the covariance of features: λmax/λmin of eq. (1).

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        eps: ε ≥ 0. With 0, a numerically rank-deficient P has κ = inf (not some rounding figure).
        features: which of the two is given; ``None`` takes a square Hermitian tensor for a covariance.

    Returns:
        (...,) float64, detached.

    Raises:
        TypeError: X_or_P is not a floating or complex tensor.
        ValueError: fewer than two dimensions, no channel or sample, NaN or infinity, or, with ``features=False``, a
            matrix that is not Hermitian (both checked on the CPU by default); a negative eps.

    Reads values: pass the whole batch rather than single matrices under ``torch.func.vmap``.

    Complexity: O(d n min(d, n)); see :func:`covariance_spectrum`. Source: eq. (1) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> condition_number(torch.diag(torch.tensor([100.0, 1.0])))
        tensor(100., dtype=torch.float64)
    """
    require_nonnegative(eps, "eps")
    found, unit = _spectrum_and_unit(X_or_P, features)
    if isinstance(unit, Tensor) and eps:
        return found.condition_number((eps / unit / unit).clamp_max(1e300))
    return found.condition_number(eps)


def effective_rank(X_or_P: Tensor, *, features: bool | None = None) -> Tensor:
    """The participation ratio (tr P)²/tr P² of a covariance, given itself or by features.

    It is d for P = I and 1 for rank one.

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        features: which of the two is given; ``None`` takes a square Hermitian tensor for a covariance.

    Returns:
        (...,) float64, detached; 0 for P = 0.

    Raises:
        TypeError: X_or_P is not a floating or complex tensor.
        ValueError: fewer than two dimensions, no channel or sample, NaN or infinity, or, with ``features=False``, a
            matrix that is not Hermitian (both checked on the CPU by default).

    Complexity: that of :func:`condition_number`. Source: Roy and Vetterli, EUSIPCO 2007, with the Rényi entropy of
    order 2.

    Example:
        >>> import torch
        >>> effective_rank(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """
    return _spectrum_and_unit(X_or_P, features)[0].effective_rank


def numerical_rank(X_or_P: Tensor, *, features: bool | None = None) -> Tensor:
    """The number of eigenvalues above the tolerance of :func:`covariance_spectrum` or :func:`matrix_spectrum`.

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        features: which of the two is given; ``None`` takes a square Hermitian tensor for a covariance.

    Returns:
        (...,) int64, detached.

    Raises:
        TypeError: X_or_P is not a floating or complex tensor.
        ValueError: fewer than two dimensions, no channel or sample, NaN or infinity, or, with ``features=False``, a
            matrix that is not Hermitian (both checked on the CPU by default).

    Complexity: that of :func:`condition_number`. Source: Golub and Van Loan, Matrix Computations, 4th ed., sect. 5.4.

    Example:
        >>> import torch
        >>> numerical_rank(torch.diag(torch.tensor([1.0, 1e-20])))
        tensor(1)
    """
    return _spectrum_and_unit(X_or_P, features)[0].numerical_rank
