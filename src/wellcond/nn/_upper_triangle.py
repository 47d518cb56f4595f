"""The upper triangle of a matrix as a vector."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from wellcond._shared.torch_internals import has_values, is_compiling, under_functorch


def upper_triangle(Q: Tensor, isometric: bool = False) -> Tensor:
    """Q (N, d, d) to its upper triangle (N, d(d + 1)/2), row by row; ``isometric``: with the rest times √2."""
    plain = has_values(Q) and not (is_compiling() or torch.jit.is_tracing() or under_functorch())
    upper, diagonal = (_remembered if plain else _positions)(Q.shape[-1], Q.device)
    # index_select, not Q[:, upper]: the backward of the latter sorts its indices, and takes five times as long.
    packed = Q.flatten(1).index_select(1, upper)
    return torch.where(diagonal, packed, 2.0**0.5 * packed) if isometric else packed


def _positions(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the entries of the triangle in a flat matrix, and which are on its diagonal."""
    rows, columns = torch.triu_indices(d, d, device=device)
    return rows * d + columns, rows == columns


@lru_cache(maxsize=64)
def _remembered(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # where they are made first, but not only used
        return _positions(d, device)
