"""Polar factors of gradients, and which gradients have one, in as few operations as the device allows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from wellcond._shared.exact_products import exact_products
from wellcond._shared.torch_internals import is_compiling, is_shape_only
from wellcond.linalg import Minimax, polar, value_checks

from ._polar_by_poles import ROWS, by_poles

KINDS = ("zero", "treated", "nonfinite")
"""The names of the kinds 0, 1 and 2 of :func:`polar_factors`."""
SOLVERS = ("auto", "svd", "poles", "minimax", "muon")


def solver_for(matrix: Tensor, solver: str | Minimax) -> str | Minimax:
    """What ``"auto"`` stands for: exact on the CPU; elsewhere a method for which the host does not wait."""
    if solver == "auto":
        solver = "svd" if matrix.device.type == "cpu" else "poles"
    fits = min(matrix.shape[-2:]) <= ROWS and matrix.dtype != torch.float64
    return solver if solver != "poles" or fits else "minimax"


def polar_factors(matrix: Tensor, solver: str | Minimax = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The solution R = U Vᵀ of eq. (14), eq. (17), for every matrix (..., m, n) of a batch that has one.

    Also returns the ``kind`` (..., 1, 1) of each, and the batch in the precision of R. Kind 1 has a factor; 0 is zero
    or too small to have a direction (its entries are below the smallest normal number, and so rounding errors); 2
    contains NaN or infinity. R is meaningless for kinds other than 1. Singular directions that vanish up to rounding
    are left out of R rather than filled in arbitrarily. Only ``"svd"`` makes the host wait for a device.
    """
    single = torch.promote_types(matrix.dtype, torch.float32)
    tiny, solver = torch.finfo(single).tiny, solver_for(matrix, solver)
    if solver == "poles":
        work = matrix.double()
        factor, size = by_poles(work)
        return factor, _kind(size, tiny**2), work
    work = matrix.to(single)
    # Not the infinity norm, for which PyTorch takes ten times as long on the CPU.
    kind = _kind(work.abs().amax((-2, -1), keepdim=True), tiny)
    with value_checks(False), exact_products():  # checked above, without reading the answer on the host
        factor = polar(work.masked_fill(kind != 1, 0.0), solver=solver)
    return factor, kind, work


def _kind(size: Tensor, tiny: float) -> Tensor:
    """0 below ``tiny``, 1 between, 2 for infinity and NaN."""
    return torch.bucketize(size, _boundaries(size, tiny), right=True)


def _boundaries(like: Tensor, tiny: float) -> Tensor:
    kept = like.is_meta or not (is_shape_only(like) or is_compiling())
    return (_remembered if kept else _new)(tiny, like.dtype, str(like.device))


def _new(tiny: float, dtype: torch.dtype, device: str) -> Tensor:
    return torch.tensor([tiny, torch.inf], dtype=dtype, device=device)


_remembered = lru_cache(maxsize=32)(_new)


def norm_ratio(matrix: Tensor, factor: Tensor) -> Tensor:
    """‖G‖_F/‖R‖_F (..., 1, 1) of matrices and their factors, in double precision."""
    if matrix.dtype == torch.float64:  # squares of large entries would overflow
        largest = matrix.abs().amax((-2, -1), keepdim=True)
        scaled = matrix / largest.clamp_min(torch.finfo(matrix.dtype).tiny)
        return largest * _frobenius(scaled) / _frobenius(factor)
    return _frobenius(matrix) / _frobenius(factor)


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float64)
