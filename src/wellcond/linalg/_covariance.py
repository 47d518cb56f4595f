"""The sample covariance of features and its factor: P = X J Xᵀ of eq. (2), P = A Aᴴ with A = (X − mean)/√n.

Even of float32 features the Gram matrix is needed in float64, as its entries lose half of the digits of the singular
values. The features are not: they are widened and centred in pieces that fit into the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from wellcond._shared.checks import hermitian_part, require_matrix
from wellcond._shared.precision import full_precision, wide_dtype, widened, working_dtype
from wellcond._shared.torch_internals import is_compiling, is_exporting


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
    require_features(X, correction)
    with full_precision(X):
        A = centred_factor(X, correction)
        P = A @ A.mH
        # BLAS need not round the two triangles alike, nor leave a complex diagonal real.
        return hermitian_part(P).to(X.dtype)


def cross_covariance(X: Tensor, Y: Tensor, *, correction: int = 0) -> Tensor:
    """The covariance C = X J Yᴴ between two sets of features of the same samples, with J = (I − 11ᵀ/n)/n.

    Of standardised features it is the cross-correlation, which Barlow Twins brings to the identity.

    Args:
        X: (..., d, n) features, n samples of d channels; any floating or complex dtype. Half precision is computed
            in float32, under autocast too.
        Y: (..., e, n) features of the same n samples; batch dimensions broadcast.
        correction: the divisor is n − correction, as in :func:`covariance`.

    Returns:
        (..., d, e), row i and column j the covariance of channel i of X with channel j of Y, in the dtype that those of
        X and Y promote to. ``cross_covariance(X, X)`` is ``covariance(X)``.

    Raises:
        TypeError: X or Y is not a floating or complex tensor.
        ValueError: fewer than two dimensions, different numbers of samples, or n ≤ correction.

    Complexity: one product of d × n by n × e. Source: Zbontar et al., Barlow Twins, ICML 2021, eq. (2), before its
    normalisation.

    Example:
        >>> import torch
        >>> X, Y = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[2.0, -2.0, 2.0, -2.0], [1.0, 1.0, 0.0, 0.0]])
        >>> cross_covariance(X, Y)
        tensor([[2., 0.]])
    """
    require_features(X, correction)
    require_matrix(Y, "Y")
    if X.shape[-1] != Y.shape[-1]:
        raise ValueError(
            f"X of shape {tuple(X.shape)} and Y of shape {tuple(Y.shape)} must have the same samples in their last "
            f"dimension, got {X.shape[-1]} and {Y.shape[-1]}"
        )
    dtype = torch.promote_types(X.dtype, Y.dtype)
    with full_precision(X):
        A, B = (centred_factor(features.to(working_dtype(dtype)), correction) for features in (X, Y))
        return (A @ B.mH).to(dtype)


def centred_factor(X: Tensor, correction: int = 0) -> Tensor:
    """A = (X − mean)/√(n − correction), so that P = A Aᴴ; in the working dtype."""
    X = X.to(working_dtype(X.dtype))
    return (X - X.mean(-1, keepdim=True)) / (X.shape[-1] - correction) ** 0.5


def require_features(X: Tensor, correction: int) -> None:
    """Raise unless X is a (..., d, n) floating or complex tensor with enough samples for a covariance."""
    require_matrix(X, "X")
    n = X.shape[-1]
    if n <= correction:
        raise ValueError(
            f"X of shape {tuple(X.shape)} has {n} sample{'s' if n != 1 else ''} in its last dimension; "
            f"a covariance with correction={correction} needs at least {correction + 1}"
        )


_PIECE = {"cpu": 1 << 18, "accelerator": 1 << 24}
"""Entries widened at a time: 2 MiB on the CPU; 128 MiB elsewhere, to keep an accelerator busy."""


def centred_gram(X: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of C Cᴴ and Cᴴ C, C = X − mean, and the mean (..., d, 1), both in double precision."""
    d, n = X.shape[-2:]
    if is_exporting():  # the graph has to accept any number of matrices
        wide = widened(X)
        mean = wide.mean(-1, keepdim=True)
        C = wide - mean
        return (C.mH @ C if n < d else C @ C.mH), mean
    side = min(d, n)
    flat = flat_means = X.new_empty(0, dtype=wide_dtype(X))
    for batch, _, part, mean in _centred_pieces(X, whole=n < d):
        product = part.mH @ part if n < d else part @ part.mH
        if part.numel() == X.numel():  # a single piece
            flat, flat_means = product, mean
            break
        if not flat.numel():
            flat = product.new_zeros(X.shape[:-2].numel(), side, side)
            flat_means = mean.new_zeros(len(flat), d, 1)
        flat[batch] += product
        flat_means[batch] = mean
    return flat.reshape(*X.shape[:-2], side, side), flat_means.reshape(*X.shape[:-1], 1)


def times_centred(Y: Tensor, X: Tensor) -> Tensor:
    """Y (X − mean) in the dtype of X, for Y (..., d, d) in double precision."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    flat, Y = out.reshape(-1, *X.shape[-2:]), Y.reshape(-1, *Y.shape[-2:])
    for batch, columns, part, _ in _centred_pieces(X):
        flat[batch, :, columns] = Y[batch] @ part
    return out


def _centred_pieces(X: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Pieces of X − mean, with the mean: matrices of the flattened batch, or some columns of a single large one."""
    d, n = X.shape[-2:]
    piece = _PIECE["cpu" if X.device.type == "cpu" else "accelerator"]
    matrices, columns = max(1, piece // max(1, d * n)), n if whole else max(1, piece // max(1, d))
    flat = X.reshape(math.prod(X.shape[:-2]), d, n)
    # A graph with a fixed number of pieces would serve one batch size only.
    starts = [slice(None)] if is_compiling() else [slice(i, i + matrices) for i in range(0, len(flat), matrices)]
    for batch in starts:
        if is_compiling() or n <= columns:
            wide = flat[batch].to(wide_dtype(X))
            mean = wide.mean(-1, keepdim=True)
            # In place only on a copy: double-precision features are not copied.
            yield batch, slice(None), wide - mean if X.dtype == wide.dtype else wide.sub_(mean), mean
            continue
        mean = flat[batch].mean(-1, keepdim=True, dtype=wide_dtype(X))
        for j in range(0, n, columns):
            chosen = slice(j, j + columns)
            yield batch, chosen, flat[batch, :, chosen] - mean, mean
