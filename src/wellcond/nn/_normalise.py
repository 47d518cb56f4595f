"""A covariance divided by its size: P/tr P or P/‖P‖_F, so that what follows does not see the scale of the features.

iSQRT-COV (Li et al., CVPR 2018) divides by c = tr P or ‖P‖_F for its iteration and multiplies the root by √c
afterwards: √c (P/c)^{1/2} = P^{1/2}, so this pair is what a solver does inside and changes nothing. Left without the
second step, f(P/c) is the same for features of any scale. For the root, (P/tr P)^{1/2} = P^{1/2}/‖P^{1/2}‖_F is the
Frobenius normalisation of MPN-COV (Li et al., ICCV 2017).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Normalisation = Literal["trace", "frobenius"]


def require_normalisation(kind: str | None) -> None:
    if kind is not None and kind not in get_args(Normalisation):
        raise ValueError(f"normalisation must be None, 'trace' or 'frobenius', got {kind!r}")


def normalised_features(X: Tensor, kind: Normalisation) -> Tensor:
    """Features (..., d, n) of zero mean and covariance P/c; features that are all equal become zero."""
    X = X - X.mean(-1, keepdim=True)
    X = _by_largest_entry(X)
    n = X.shape[-1]
    if kind == "trace":
        size = X.abs().square().sum((-2, -1), keepdim=True) / n
    else:
        size = _norm(X.mH @ X if n < X.shape[-2] else X @ X.mH) / n
    return X / torch.where(size > 0, size, 1.0).sqrt()


def normalised_matrix(P: Tensor, kind: Normalisation) -> Tensor:
    """P/c; a zero matrix stays zero."""
    P = _by_largest_entry(P)
    size = P.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None] if kind == "trace" else _norm(P)
    return P / torch.where(size > 0, size, 1.0)


def _by_largest_entry(X: Tensor) -> Tensor:
    """X with largest entry 1, so that neither its squares nor its fourth powers leave the range of the dtype.

    What follows divides by the size, so that this scale has no derivative.
    """
    largest = X.detach().abs().amax((-2, -1), keepdim=True)
    return X / torch.where(largest > 0, largest, 1.0)


def _norm(M: Tensor) -> Tensor:
    # The Frobenius norm has no derivative at 0, so the root is not taken there.
    squares = M.abs().square().sum((-2, -1), keepdim=True)
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
