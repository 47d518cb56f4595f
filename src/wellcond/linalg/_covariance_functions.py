"""Logarithm and powers of a covariance straight from the features: the factor form of ``_factor_function``."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import require_matrix, require_nonnegative
from wellcond._shared.precision import full_precision, widened, working_dtype

from ._covariance import centred_factor
from ._divided_differences import Log, Power, ScalarFunction
from ._factor_function import FactorFunction
from ._rank_policy import on_kept_eigenvalues, require_rank_policy

FactorRank = Literal["ridge", "pinv"]


def covariance_logm(X: Tensor, *, eps: float = 0.0, rank: FactorRank = "ridge", correction: int = 0) -> Tensor:
    """The logarithm log(P + εI) of the covariance of features, as the log-Euclidean metric takes it.

    Args:
        X: (..., d, n) features; any floating or complex dtype, computed in double precision.
        eps: ε ≥ 0, positive where P is singular, as it is for n ≤ d. The gradient in A is bounded by 1.61/√ε times
            the incoming one, twice the largest log(1 + σ²/ε)/σ.
        rank: ``"ridge"``, or ``"pinv"`` for the logarithm on the range of P (and 0 outside), without ε.
        correction: as in :func:`covariance`.

    Returns:
        (..., d, d) Hermitian, in the dtype of X.

    Raises:
        TypeError, ValueError: as :func:`covariance` and :func:`logm`; a singular P with neither ε nor ``"pinv"``.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d n min(d, n) + d² min(d, n)), also backward; second derivatives and forward mode take the d × d
    side, second derivatives O(d³) memory. Third derivatives are refused. Source: Daleckii–Krein on the factor.

    Example:
        >>> import torch
        >>> covariance_logm(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), eps=1.0)
        tensor([[0.6931, 0.0000],
                [0.0000, 0.0000]])
    """
    return _from_features(X, Log(), eps, rank, correction, invertible=True)


def covariance_powm(
    X: Tensor, exponent: float, *, eps: float = 0.0, rank: FactorRank = "ridge", correction: int = 0
) -> Tensor:
    """The power (P + εI)^exponent of the covariance of features.

    Args:
        X, eps, rank, correction: as in :func:`covariance_logm`; ε may be 0 for exponents ≥ 0.
        exponent: any finite real number; :func:`covariance_sqrtm` is the bounded form of 1/2. With ε = 0 the
            derivative exists at rank deficiency for exponents ≥ 1/2; below, null pairs contribute 0.

    Returns, errors, complexity and source as for :func:`covariance_logm`.

    Example:
        >>> import torch
        >>> covariance_powm(torch.tensor([[2.0, -2.0], [0.0, 0.0]]), 1.5)
        tensor([[8., 0.],
                [0., 0.]])
    """
    if not math.isfinite(exponent):
        raise ValueError(f"exponent must be a finite number, got {exponent}")
    return _from_features(X, Power(float(exponent)), eps, rank, correction, invertible=exponent < 0)


def _from_features(
    X: Tensor, f: ScalarFunction, eps: float, rank: FactorRank, correction: int, *, invertible: bool
) -> Tensor:
    require_matrix(X, "X")
    require_nonnegative(eps, "eps")
    if rank not in get_args(FactorRank):
        raise ValueError(f"rank must be one of {', '.join(get_args(FactorRank))} for features, got {rank!r}")
    require_rank_policy(rank, eps)
    with full_precision(X):
        A = centred_factor(widened(X), correction=correction)
        singular_is_error = invertible and eps == 0.0 and rank == "ridge"
        F, *_ = FactorFunction.call(
            A, on_kept_eigenvalues(f, rank), float(eps), singular_is_error, torch.finfo(working_dtype(X.dtype)).eps
        )
        return F.to(X.dtype)
