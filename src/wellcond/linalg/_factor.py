"""The factor A = (X − mean)/√n of a covariance P = A Aᴴ, decomposed as A = U √λ Vᴴ in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.checks import checks_values, hermitian_part
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.events import place
from wellcond._shared.precision import wide_dtype, widened

from ._covariance import centred_factor, centred_gram
from ._rank import feature_tolerance
from ._spectrum import unresolved
from .derivatives import reciprocal_or_zero
from .lapack import eigh, thin_svd


class Factor(NamedTuple):
    """P = U λ Uᴴ and A = U √λ Vᴴ, in double precision.

    Attributes:
        eigvals: (..., r), r = min(d, n); exactly 0 where they are rounding errors.
        U: (..., d, r).
        V: (..., n, r); empty where it would be another copy of the features and can be recomputed cheaply from A.
    """

    eigvals: Tensor
    U: Tensor
    V: Tensor


def factorise(X: Tensor, correction: int) -> Factor:
    """The factor of features (..., d, n) in the working dtype.

    In single precision, from the eigenpairs of the smaller float64 Gram matrix, which resolves σ down to
    √eps64 ≈ 1.5e-8 of the largest. In double precision, and where the Gram matrix does not resolve σ (if values can be
    read), from the singular value decomposition.
    """
    d, n = X.shape[-2:]
    divisor = n - correction
    A = None
    if X.dtype != wide_dtype(X):
        if n < d:
            wide = widened(X)
            mean = wide.mean(-1, keepdim=True)
            A = (wide - mean) / divisor**0.5
            gram = A.mH @ A
        else:
            gram, mean = centred_gram(X)
            gram = gram / divisor
        eigvals, basis = eigh(hermitian_part(gram))
        mean_square = eigvals.sum(-1) + mean.abs().square().sum((-2, -1)) * (n / divisor)
        tolerance = feature_tolerance(X, mean_square)
        if not (checks_values(X) and unresolved(eigvals, tolerance, 1e-4).any()):
            eigvals = eigvals.masked_fill(eigvals <= tolerance.unsqueeze(-1), 0.0)
            if A is None:
                return Factor(eigvals, basis, basis.new_empty(*X.shape[:-2], 0, 0))
            V = basis * (eigvals > 0).unsqueeze(-2)
            return Factor(eigvals, A @ (V * reciprocal_or_zero(eigvals.sqrt()).unsqueeze(-2)), V)
    wide = widened(X)
    A = centred_factor(wide, correction)
    U, sigma, Vh = thin_svd(A if n < d else A.mH)
    U, V = (U, Vh.mH) if n < d else (Vh.mH, U)
    mean_square = torch.linalg.vector_norm(wide, dim=(-2, -1)).square() / divisor
    if checks_values(X) and not torch.isfinite(mean_square).all():
        raise NonFiniteMatrixError(
            f"X{place()} has entries up to {X.abs().max().item():.1e}, whose squares are infinite"
        )
    eigvals = sigma.square()
    kept = eigvals > feature_tolerance(X, mean_square).unsqueeze(-1)
    return Factor(torch.where(kept, eigvals, 0.0), U, V * kept.unsqueeze(-2))
