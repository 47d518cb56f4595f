"""The sample covariance of features and its factor: P = X J Xᵀ of eq. (2), P = A Aᴴ with A = (X − mean)/√n."""

from __future__ import annotations

from torch import Tensor

from wellcond._shared.checks import require_matrix
from wellcond._shared.precision import full_precision, working_dtype


def covariance(X: Tensor, *, correction: int = 0) -> Tensor:
    """The covariance P = X J Xᴴ of features, with J = (I − 11ᵀ/n)/n. No n × n matrix is formed.

    Args:
        X: (..., d, n) features, n samples of d channels; any floating or complex dtype. Half precision is computed
            in float32, under autocast too.
        correction: the divisor is n − correction; 0 is the paper's and batch norm's, 1 the unbiased estimate.

    Returns:
        (..., d, d) Hermitian positive semidefinite, in the dtype of X. Its rank is at most min(d, n − 1).

    Raises:
        TypeError: X is not a floating or complex tensor.
        ValueError: fewer than two dimensions, or n ≤ correction.

    Complexity: one product of d × n by n × d. Source: eq. (2) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> covariance(torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, -2.0, 2.0, -2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    require_matrix(X, "X")
    with full_precision(X):
        A = centred_factor(X, correction=correction)
        P = A @ A.mH
        # BLAS need not round the two triangles alike, nor leave a complex diagonal real.
        return ((P + P.mH) / 2).to(X.dtype)


def centred_factor(X: Tensor, *, correction: int = 0) -> Tensor:
    """A = (X − mean)/√(n − correction), so that P = A Aᴴ; in the working dtype."""
    require_matrix(X, "X")
    require_samples(X, correction)
    X = X.to(working_dtype(X.dtype))
    return (X - X.mean(-1, keepdim=True)) / (X.shape[-1] - correction) ** 0.5


def require_samples(X: Tensor, correction: int) -> None:
    """Refuse features with too few samples for a covariance."""
    n = X.shape[-1]
    if n <= correction:
        raise ValueError(
            f"X of shape {tuple(X.shape)} has {n} sample{'s' if n != 1 else ''} in its last dimension; "
            f"a covariance with correction={correction} needs at least {correction + 1}"
        )
