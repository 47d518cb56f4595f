"""How well conditioned a covariance is: κ(P) of eq. (1), κ over the range, numerical and effective rank.

Three figures that are never to be mixed (and all needed): κ(P) without ε, infinite where the numerical rank is short;
κ(P + εI), what a solver sees; and the effective rank (tr P)²/tr P².
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import checks_values, hermitian, require_finite, require_matrix, require_nonnegative
from ._covariance import centred_factor
from ._eigh import eigh


class Spectrum(NamedTuple):
    """Eigenvalues of covariances in float64 and what they can be trusted to.

    Attributes:
        eigvals: (..., d) in descending order, never negative.
        tolerance: (...,) eigenvalues at or below it are rounding.
    """

    eigvals: Tensor
    tolerance: Tensor

    @property
    def numerical_rank(self) -> Tensor:
        """(...,) int64 count of eigenvalues above the tolerance."""
        return (self.eigvals > self.tolerance.unsqueeze(-1)).sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """(...,) the participation ratio (tr P)²/tr P², 0 for a zero matrix."""
        # Dividing by the largest keeps the squares inside the range of float64.
        ratio = self.eigvals / self.eigvals.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        return ratio.sum(-1).square() / ratio.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)

    def condition_number(self, eps: float = 0.0) -> Tensor:
        """(...,) κ(P + εI). With ε = 0 it is infinite where P is numerically rank deficient."""
        largest, smallest = self.eigvals[..., 0], self.eigvals[..., -1]
        if eps > 0.0:
            return (largest + eps) / (smallest + eps)
        kappa = largest / smallest.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(smallest > self.tolerance, kappa, torch.inf)

    def range_condition_number(self) -> Tensor:
        """(...,) κ over the numerical range: the largest eigenvalue by the smallest above the tolerance (1 if none)."""
        above = torch.where(self.eigvals > self.tolerance.unsqueeze(-1), self.eigvals, torch.inf).amin(-1)
        return torch.where(torch.isfinite(above), self.eigvals[..., 0] / above, 1.0)


# Below this ratio the eigenvalues of a float64 Gram matrix lose more than half of their digits.
GRAM_RESOLVES = 1e-8


def covariance_spectrum(X: Tensor, *, correction: int = 0) -> Spectrum:
    """The spectrum of the covariance of features X (..., d, n), from the singular values of the factor A in float64.

    The eigenvalues of the float64 Gram matrix of A are as good while they span less than eight decades, and many times
    cheaper; only matrices that span more take the singular values of A (its triangular factor, when n > d). The
    tolerance is (eps · max(d, n))² of the largest eigenvalue with the eps of the dtype of X, the usual rank tolerance
    on the singular values of A.
    """
    require_matrix(X, "X")
    if checks_values(X):
        require_finite(X, "X")
    eps = torch.finfo(X.dtype).eps
    d, n = X.shape[-2:]
    A = centred_factor(X.to(torch.complex128 if X.is_complex() else torch.float64), correction=correction)
    gram = A @ A.mH if d <= n else A.mH @ A
    eigvals = eigh((gram + gram.mH) / 2)[0].flip(-1).clamp_min(0.0)
    coarse = eigvals[..., -1] < GRAM_RESOLVES * eigvals[..., 0]
    if coarse.any():
        eigvals[coarse] = _singular_values(A[coarse]).square()
    if n < d:
        eigvals = torch.nn.functional.pad(eigvals, (0, d - n))
    return Spectrum(eigvals, (eps * max(d, n)) ** 2 * eigvals[..., 0])


def _singular_values(A: Tensor) -> Tensor:
    tall = A.mH if A.shape[-1] > A.shape[-2] else A
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)


def matrix_spectrum(P: Tensor) -> Spectrum:
    """The spectrum of given covariances P (..., d, d), in float64; the tolerance is eps · d of the largest eigenvalue.

    A covariance formed in a dtype of precision eps can show κ up to 1/eps at best; from the features
    :func:`covariance_spectrum` sees its square.
    """
    require_matrix(P, "P", square=True)
    eps = torch.finfo(P.dtype).eps
    wide = hermitian(P).to(torch.complex128 if P.is_complex() else torch.float64)
    eigvals = eigh(wide)[0].flip(-1).clamp_min(0.0)
    return Spectrum(eigvals, eps * P.shape[-1] * eigvals[..., 0])


def spectrum(X_or_P: Tensor, *, features: bool | None = None, correction: int = 0) -> Spectrum:
    """The spectrum of the covariance of features, or of a covariance.

    Args:
        X_or_P: (..., d, n) features or (..., d, d) covariances, any floating or complex dtype; float64 work.
        features: which of the two; ``None`` takes a square Hermitian tensor for covariances, all else for features.
        correction: as in :func:`covariance`, for features.
    """
    require_matrix(X_or_P, "X_or_P")
    if features is None:
        square = X_or_P.shape[-1] == X_or_P.shape[-2]
        features = not (square and torch.allclose(X_or_P, X_or_P.mH, rtol=1e-3, atol=0.0, equal_nan=True))
    with torch.no_grad():
        return covariance_spectrum(X_or_P, correction=correction) if features else matrix_spectrum(X_or_P)


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
