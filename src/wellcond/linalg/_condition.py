"""How well conditioned a covariance is: its condition number (eq. 1), numerical and effective rank."""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import checks_values, hermitian, require_finite, require_matrix, require_nonnegative
from wellcond._shared.precision import widened

from ._feature_spectrum import covariance_spectrum
from ._spectrum import Spectrum
from .lapack import eigh


def matrix_spectrum(P: Tensor) -> Spectrum:
    """The spectrum of given covariances P (..., d, d), in float64; the tolerance is eps·d of the largest eigenvalue.

    A covariance formed in a dtype of precision eps can show κ up to 1/eps at best; from the features
    :func:`covariance_spectrum` sees its square.
    """
    require_matrix(P, "P", square=True)
    eps = torch.finfo(P.dtype).eps
    wide = widened(hermitian(P))
    eigvals = eigh(wide)[0].flip(-1).clamp_min(0.0)
    return Spectrum(eigvals, eps * P.shape[-1] * eigvals[..., 0])


def spectrum(X_or_P: Tensor, *, features: bool | None = None) -> Spectrum:
    """The spectrum of the covariance of features, or of a covariance.

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        features: which of the two; ``None`` takes a square Hermitian tensor for covariances, all else for features.
    """
    require_matrix(X_or_P, "X_or_P")
    if X_or_P.shape[-2] == 0:
        raise ValueError(f"X_or_P of shape {tuple(X_or_P.shape)} has no channels, and so no spectrum")
    if features is None:
        square = X_or_P.shape[-1] == X_or_P.shape[-2]
        features = not (square and torch.allclose(X_or_P, X_or_P.mH, rtol=1e-3, atol=0.0, equal_nan=True))
    if not features:
        with torch.no_grad():
            return matrix_spectrum(X_or_P)
    if X_or_P.shape[-1] == 0:
        raise ValueError(f"X_or_P of shape {tuple(X_or_P.shape)} has no samples, and so no covariance")
    if checks_values(X_or_P):
        require_finite(X_or_P, "X_or_P")
    return covariance_spectrum(X_or_P)


def condition_number(X_or_P: Tensor, *, eps: float = 0.0, features: bool | None = None) -> Tensor:
    """κ(P + εI) of covariances or of the covariance of features: λmax/λmin of eq. (1).

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        eps: ε ≥ 0. With 0, a numerically rank-deficient P has κ = inf (not some rounding figure).
        features: which of the two is given; ``None`` takes a square Hermitian tensor for a covariance.

    Returns:
        (...,) float64, detached.

    Raises:
        TypeError, ValueError: as for :func:`covariance` and :func:`sqrtm`; a negative eps.

    Values are read: give it the batch itself, not one matrix at a time under ``torch.func.vmap``.

    Complexity: O(d n min(d, n)); see :func:`covariance_spectrum`. Source: eq. (1) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> condition_number(torch.diag(torch.tensor([100.0, 1.0])))
        tensor(100., dtype=torch.float64)
    """
    require_nonnegative(eps, "eps")
    return spectrum(X_or_P, features=features).condition_number(eps)


def effective_rank(X_or_P: Tensor, *, features: bool | None = None) -> Tensor:
    """The participation ratio (tr P)²/tr P² of covariances or of the covariance of features: d for P = I, 1 for rank
    one.

    Arguments and errors as for :func:`condition_number`; (...,) float64, detached.
    """
    return spectrum(X_or_P, features=features).effective_rank


def numerical_rank(X_or_P: Tensor, *, features: bool | None = None) -> Tensor:
    """The number of eigenvalues above the tolerance of :func:`covariance_spectrum` or :func:`matrix_spectrum`.

    Arguments and errors as for :func:`condition_number`; (...,) int64, detached.
    """
    return spectrum(X_or_P, features=features).numerical_rank
