"""Whitening from the features themselves, without forming their covariance: κ(P) counts with its square root.

With the tall T = Aᴴ (or A where there are fewer samples than channels) and B = [T; √ε I], BᴴB is the covariance on the
smaller side plus ε. ZCA is the polar factor of B, cut to the rows of T: (A Aᴴ + εI)^{-1/2} A = A (Aᴴ A + εI)^{-1/2}.
Cholesky is the orthonormal factor of a QR decomposition of B. Both see singular values down to eps of the largest,
and so κ(P) up to 1/eps², where P in the same dtype shows 1/eps (Golub and Van Loan, Matrix Computations, 4th ed.,
sect. 5.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import bad_indices, readable, require_finite
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place

from ._polar import Polar
from ._rank_policy import Rank


def zca_from_factor(A: Tensor, eps: float, rank: Rank) -> Tensor:
    """(A Aᴴ + εI)^{-1/2} A, on the range of A alone for ``rank="pinv"``."""
    d, n = A.shape[-2:]
    T = A if n < d else A.mH
    # A ridge leaves no singular value of B below √ε: nothing is cut then.
    cut = torch.finfo(A.dtype).eps * max(d, n) if rank == "pinv" else 0.0
    W, sigma, _ = Polar.call(_with_ridge(T, eps), cut, "X")
    if rank == "ridge" and eps == 0.0:
        _require_full_rank(sigma, A)
    W = W[..., : T.shape[-2], :]
    return W if n < d else W.mH


def cholesky_from_factor(A: Tensor, eps: float) -> Tensor:
    """L^{-1} A with L Lᴴ = A Aᴴ + εI, lower triangular."""
    n = A.shape[-1]
    if readable(A):
        require_finite(A, "X")
    Q, R = torch.linalg.qr(_with_ridge(A.mH, eps))
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    if eps == 0.0:
        _require_full_rank(diagonal.abs(), A)
    # LAPACK leaves the signs of the diagonal open.
    return (Q[..., :n, :] * diagonal.detach().sgn().unsqueeze(-2)).mH


def _with_ridge(T: Tensor, eps: float) -> Tensor:
    if eps == 0.0:
        return T
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return torch.cat([T, (eps**0.5 * eye).expand(*T.shape[:-2], *eye.shape)], -2)


def _require_full_rank(sigma: Tensor, A: Tensor) -> None:
    """Refuse a covariance that is singular up to the rounding of the features."""
    d, n = A.shape[-2:]
    if n < d:
        singular = torch.ones(A.shape[:-2], dtype=torch.bool, device=A.device)
    elif readable(A) and sigma.numel():
        singular = sigma.amin(-1) <= torch.finfo(A.dtype).eps * d**0.5 * sigma.amax(-1)
    else:
        return
    if singular.any():
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding"
            f"{bad_indices(singular) if n >= d else ''}{place()}; give eps > 0, or method='zca' with rank='pinv'"
        )
