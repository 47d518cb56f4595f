"""Whitened features without forming their covariance P, so that only √κ(P) enters.

With the tall T = Aᴴ (or A where there are fewer samples than channels) and B = [T; √ε I], BᴴB is the covariance on the
smaller side plus ε. ZCA is the polar factor of B, restricted to the rows of T: (A Aᴴ + εI)^{-1/2} A =
A (Aᴴ A + εI)^{-1/2}. Cholesky is the orthonormal factor of a QR decomposition of B (Golub and Van Loan, Matrix
Computations, 4th ed., sect. 5.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import bad_indices, readable, require_finite
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.products import positive_or_one

from .._polar import Polar
from .._rank import Rank, feature_tolerance
from ._matrix import WhiteningMethod


def white_factor(
    X: Tensor, A: Tensor, scale: Tensor | float, method: WhiteningMethod, eps: float, rank: Rank
) -> Tensor:
    """The whitened A = (X − mean)/(√n · scale), without forming its covariance."""
    d, n = A.shape[-2:]
    sigma = floor = None
    if eps == 0.0:
        largest = X.detach().abs().amax((-2, -1), keepdim=True)
        unit = X.detach() / positive_or_one(largest)
        mean_square = torch.linalg.vector_norm(unit, dim=(-2, -1), dtype=A.dtype).real.square() / n
        floor = feature_tolerance(X, mean_square).sqrt() * (largest / scale)[..., 0, 0]
    if method == "cholesky":
        if readable(A):
            require_finite(A, "X")
        Q, R = torch.linalg.qr(_with_ridge(A.mH, eps))
        # LAPACK does not fix the signs of the diagonal.
        white = (Q[..., :n, :] * R.diagonal(dim1=-2, dim2=-1).detach().sgn().unsqueeze(-2)).mH
        if floor is not None and n > d and readable(R):
            sigma = torch.linalg.svdvals(R.detach())
    else:
        T = A if n < d else A.mH
        # With a ridge no singular value of B is below √ε, so nothing is cut.
        cut = floor.unsqueeze(-1) if floor is not None and rank == "pinv" else None
        W, sigma, _ = Polar.call(_with_ridge(T, eps), 0.0, cut, "X")
        W = W[..., : T.shape[-2], :]
        white = W if n < d else W.mH
    if floor is not None and rank == "ridge":
        _require_full_rank(A, sigma, floor)
    return white


def _with_ridge(T: Tensor, eps: float) -> Tensor:
    if eps == 0.0:
        return T
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return torch.cat([T, (eps**0.5 * eye).expand(*T.shape[:-2], *eye.shape)], -2)


def require_samples(A: Tensor) -> None:
    """Raise if samples are too few for a covariance of full rank: centred features span at most n − 1 directions."""
    if A.shape[-1] <= A.shape[-2]:
        if readable(A):
            require_finite(A, "X")
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding{place()}: {A.shape[-1]} "
            f"samples span at most {A.shape[-1] - 1} directions; give eps > 0, or method='zca' with rank='pinv'"
        )


def _require_full_rank(A: Tensor, sigma: Tensor | None, floor: Tensor) -> None:
    """Raise if the covariance is singular up to the rounding of the features."""
    require_samples(A)
    if sigma is None or not readable(A):
        return
    singular = sigma.amin(-1) <= floor
    if singular.any():
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding"
            f"{bad_indices(singular)}{place()}; give eps > 0, or method='zca' with rank='pinv'"
        )
