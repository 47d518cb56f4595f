"""The polar factors of gradients, and which gradients have one, in as few operations as the device allows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from wellcond._shared.exact_products import exact_products
from wellcond._shared.torch_internals import is_compiling, is_shape_only
from wellcond.linalg import Minimax, polar, value_checks

from ._polar_by_poles import ROWS, by_poles

KINDS = ("zero", "treated", "nonfinite")
"""By the number that :func:`polar_factors` gives: below, between and beyond two boundaries."""
SOLVERS = ("auto", "svd", "poles", "minimax", "muon")


def solver_for(matrix: Tensor, solver: str | Minimax) -> str | Minimax:
    """What ``"auto"`` means for this matrix or batch: exact on the CPU, without waiting for the host elsewhere."""
    if solver == "auto":
        solver = "svd" if matrix.device.type == "cpu" else "poles"
    fits = min(matrix.shape[-2:]) <= ROWS and matrix.dtype != torch.float64
    return solver if solver != "poles" or fits else "minimax"


def polar_factors(matrix: Tensor, solver: str | Minimax = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The solution R = U Vᵀ of eq. (14), eq. (17), for every matrix (..., m, n) of a batch that has one.

    With it come the ``kind`` (..., 1, 1) of each, and the batch in the precision of R. The kinds are 1, a matrix that
    has one; 0, zero or too small to have a direction (its entries below the smallest normal number, so that they are
    rounding); 2, NaN or infinity in it. Where it is not 1, R is of no meaning. Singular directions that vanish to
    rounding are left out of R, rather than filled in at random. Only ``"svd"`` makes the host wait for a device.
    """
    single = torch.promote_types(matrix.dtype, torch.float32)
    tiny, solver = torch.finfo(single).tiny, solver_for(matrix, solver)
    if solver == "poles":
        work = matrix.double()
        factor, size = by_poles(work)
        return factor, _kind(size, tiny**2), work
    work = matrix.to(single)
    # Not the norm of order infinity: PyTorch takes ten times as long for it on the CPU.
    kind = _kind(work.abs().amax((-2, -1), keepdim=True), tiny)
    with value_checks(False), exact_products():  # checked just above, without reading the answer on the host
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
    if matrix.dtype == torch.float64:  # whose large entries have squares out of range
        largest = matrix.abs().amax((-2, -1), keepdim=True)
        scaled = matrix / largest.clamp_min(torch.finfo(matrix.dtype).tiny)
        return largest * _frobenius(scaled) / _frobenius(factor)
    return _frobenius(matrix) / _frobenius(factor)


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float64)
