"""The spectrum of a covariance in float64, how far it can be trusted, and the numbers derived from it.

Three numbers must not be confused: κ(P) of eq. (1) without ε, infinite if P is rank deficient;
κ(P + εI), which a solver sees; and the effective rank (tr P)²/tr P².

κ(P) = λ_max/λ_min is the square of the condition number of the factor A (Golub and Van Loan, Matrix Computations,
4th ed., sect. 2.4). One float64 product is enough in almost every case: its error is a few √d·eps64·λ_max, for float32
features no more than their own rounding, since eps32² = 64 eps64. A itself is decomposed only if an eigenvalue lies
above the tolerance but below what the Gram matrix resolves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.checks import hermitian, require_matrix
from wellcond._shared.precision import widened

from ._covariance import centred_gram
from ._rank import feature_tolerance, matrix_tolerance
from .lapack import eigh


class Spectrum(NamedTuple):
    """Eigenvalues of covariances in float64 and how far they can be trusted.

    Attributes:
        eigvals: (..., d) float64 in descending order, never negative.
        tolerance: (...,) float64; eigenvalues up to it may be rounding errors.

    Example:
        >>> import torch
        >>> from wellcond.linalg import spectrum
        >>> seen = spectrum(torch.diag(torch.tensor([4.0, 1.0])))
        >>> seen.condition_number().item(), seen.condition_number(eps=2.0).item(), seen.numerical_rank.item()
        (4.0, 2.0, 2)
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

    def condition_number(self, eps: float | Tensor = 0.0) -> Tensor:
        """(...,) κ(P + εI), with one ε or one per matrix; infinite for ε = 0 and a numerically rank-deficient P."""
        largest, smallest = self.eigvals[..., 0], self.eigvals[..., -1]
        if isinstance(eps, Tensor) or eps > 0.0:
            return (largest + eps) / (smallest + eps)
        kappa = largest / smallest.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(smallest > self.tolerance, kappa, torch.inf)

    def range_condition_number(self) -> Tensor:
        """(...,) κ over the numerical range: the largest eigenvalue over the smallest above the tolerance, else 1."""
        above = torch.where(self.eigvals > self.tolerance.unsqueeze(-1), self.eigvals, torch.inf).amin(-1)
        return torch.where(torch.isfinite(above), self.eigvals[..., 0] / above, 1.0)


def matrix_spectrum(P: Tensor) -> Spectrum:
    """The spectrum of covariances P, in float64, with the tolerance d·eps of the largest eigenvalue.

    A covariance formed in precision eps resolves κ up to 1/eps; :func:`covariance_spectrum` resolves its square, from
    the features.

    Args:
        P: (..., d, d) Hermitian, any floating or complex dtype.

    Returns:
        A :class:`Spectrum`: (..., d) eigenvalues in float64 and (...,) tolerances, on the device of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, is empty, or not finite or not Hermitian (both checked on the CPU by default).

    Complexity: one eigendecomposition, O(d³) per matrix. Source, for the tolerance: Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, ch. 3.

    Example:
        >>> import torch
        >>> matrix_spectrum(torch.diag(torch.tensor([4.0, 1.0, 0.0]))).numerical_rank
        tensor(2)
    """
    require_matrix(P, "P", square=True)
    require_entries(P, "P")
    eigvals = eigh(widened(hermitian(P)))[0].flip(-1).clamp_min(0.0)
    return Spectrum(eigvals, matrix_tolerance(eigvals, P.dtype).squeeze(-1))


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Spectrum:
    """Eigenvalues and rank tolerance of the covariances of features, on the CPU.

    Args:
        features: (..., d, n), any floating or complex dtype.

    Returns:
        A :class:`Spectrum`: (..., d) eigenvalues and (...,) tolerances in float64, NaN where features are not finite.
        The host waits for the device only to fetch the small matrices.

    Raises:
        TypeError: ``features`` is not a floating or complex tensor.
        ValueError: fewer than two dimensions, no channel or no sample.

    Complexity: one float64 product of d n min(d, n) multiplications per matrix and O(min(d, n)³), and about twice as
    much again in the rare case that the features themselves have to be decomposed. Source: Golub and Van Loan, Matrix
    Computations, 4th ed., sect. 2.4.

    Example:
        >>> import torch
        >>> covariance_spectrum(torch.tensor([[1.0, -1.0], [2.0, -2.0]])).numerical_rank
        tensor(1)
    """
    require_matrix(features, "features")
    require_entries(features, "features")
    d, n = features.shape[-2:]
    if features.device.type == "mps":  # no float64 there
        features = features.cpu()
    gram, mean = centred_gram(features)
    gram, mean = gram.cpu() / n, mean.cpu()
    finite = torch.isfinite(gram).all(-1).all(-1)
    mean_square = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) + mean.abs().square().sum((-2, -1))
    tolerance = feature_tolerance(features, mean_square).masked_fill(~finite, torch.nan)
    eigvals = torch.linalg.eigvalsh(gram.masked_fill(~finite[..., None, None], 0.0)).flip(-1)
    coarse = finite & unresolved(eigvals, tolerance).any(-1)
    if coarse.any():
        chosen = coarse.to(features.device)
        eigvals[coarse] = _squared_singular_values(widened(features[chosen]) - mean.to(features.device)[chosen])
    if n < d:
        eigvals = torch.nn.functional.pad(eigvals, (0, d - n))
    return Spectrum(eigvals.clamp_min(0.0).masked_fill(~finite[..., None], torch.nan), tolerance)


def unresolved(eigvals: Tensor, tolerance: Tensor, wanted: float = 0.01) -> Tensor:
    """Which eigenvalues (..., r) are above, or almost above, the tolerance (...,), but not resolved by a float64 Gram
    matrix to the relative accuracy ``wanted`` (their eigenvectors to as many radians).
    """
    error = 4 * eigvals.shape[-1] ** 0.5 * torch.finfo(torch.float64).eps * eigvals.amax(-1, keepdim=True)
    return (eigvals + error > tolerance.unsqueeze(-1)) & (eigvals < error / wanted)


def require_entries(x: Tensor, name: str) -> None:
    for size, missing in zip(x.shape[-2:], ("channels", "samples"), strict=True):
        if size == 0:
            raise ValueError(f"{name} of shape {tuple(x.shape)} has no {missing}, and so no spectrum")


def _squared_singular_values(centred: Tensor) -> Tensor:
    """λ = σ(A)² by QR of the tall side, exact to eps64²·λ_max, from the centred features √n A."""
    tall = centred.mH if centred.shape[-2] <= centred.shape[-1] else centred
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R.cpu()).square() / centred.shape[-1]
