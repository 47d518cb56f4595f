"""Positive powers of a rank-deficient covariance straight from its features.

With A = (X − mean)/√n and n < d, P^p = A (AᵀA)^{p−1} Aᵀ, the power taken on the range: the null space of AᵀA drops out
on both sides, so the n × n matrix says all. Without this the d − n null eigenvalues of P are rounding noise δ, and a
power below 1 makes δ^p of it: 4e-3 of a relative δ = 1e-8 at p = 0.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.linalg import covariance, powm


def covariance_powm(X: Tensor, exponent: float) -> Tensor:
    """P^exponent, exponent > 0, of the covariance P of features X (..., d, n); computed in float64, in the dtype of X.

    Where eigenvalues are zero up to rounding (d·eps of float64) they stay zero and have no gradient of their own.
    """
    d, n = X.shape[-2:]
    wide = X.to(torch.complex128 if X.is_complex() else torch.float64)
    if n >= d:
        return powm(covariance(wide), exponent, rank="pinv").to(X.dtype)
    A = (wide - wide.mean(-1, keepdim=True)) / n**0.5
    return (A @ powm(A.mH @ A, exponent - 1.0, rank="pinv") @ A.mH).to(X.dtype)
