"""Products of narrow features (..., d, n) in double precision, without a wide copy of them all.

Of float32 features the Gram matrix is needed in float64 (its entries lose half of the digits of the singular values),
the features themselves are not: they are widened and centred a piece at a time, small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wellcond._shared.precision import wide_dtype

_PIECE = {"cpu": 1 << 18, "accelerator": 1 << 24}
"""Entries widened at a time: 2 MiB on the CPU, 128 MiB to keep an accelerator busy."""


def wide_gram(X: Tensor) -> Tensor:
    """(X − mean)(X − mean)ᴴ as (..., d, d), in double precision."""
    gram = X.new_zeros(*X.shape[:-1], X.shape[-2], dtype=wide_dtype(X))
    flat = gram.reshape(-1, *gram.shape[-2:])
    for batch, _, part in _centred_pieces(X):
        flat[batch] += part @ part.mH
    return gram


def wide_product(Y: Tensor, X: Tensor) -> Tensor:
    """Y (X − mean) of wide Y (..., d, d), in the dtype of X."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    flat, Y = out.reshape(-1, *X.shape[-2:]), Y.reshape(-1, *Y.shape[-2:])
    for batch, columns, part in _centred_pieces(X):
        flat[batch, :, columns] = Y[batch] @ part
    return out


def _centred_pieces(X: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces of X − mean: whole matrices of the flattened batch, or some columns of one that is large."""
    d, n = X.shape[-2:]
    piece = _PIECE["cpu" if X.device.type == "cpu" else "accelerator"]
    matrices, columns = max(1, piece // max(1, d * n)), max(1, piece // max(1, d))
    flat = X.reshape(-1, d, n)
    for i in range(0, len(flat), matrices):
        batch = slice(i, i + matrices)
        if n <= columns:
            wide = flat[batch].to(wide_dtype(X))
            yield batch, slice(None), wide.sub_(wide.mean(-1, keepdim=True))
            continue
        mean = flat[batch].mean(-1, keepdim=True, dtype=wide_dtype(X))
        for j in range(0, n, columns):
            chosen = slice(j, j + columns)
            yield batch, chosen, flat[batch, :, chosen] - mean
