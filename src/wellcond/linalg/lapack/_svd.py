"""A thin singular value decomposition that does not crash: what ``_eigh`` is to Hermitian matrices.

The chain for a batch in which LAPACK's divide and conquer did not converge, matrix by matrix: float64 → a triangular
factor first → the eigenpairs of the float64 Gram matrix (small singular values then keep half of their digits).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wellcond._shared.errors import DecompositionError
from wellcond._shared.events import count_call, count_failure, place
from wellcond._shared.precision import widened
from wellcond._shared.torch_internals import outside_the_compiler

from ._batches import in_threads

Svd = tuple[Tensor, Tensor, Tensor]


@outside_the_compiler
def thin_svd(A: Tensor) -> Svd:
    """U (..., m, n), σ (..., n) falling and Vᴴ (..., n, n) of a tall finite A (..., m, n); not differentiated."""
    count_call()
    try:
        return in_threads(_lapack, A)  # pyright: ignore[reportReturnType]
    except torch.linalg.LinAlgError:
        flat = A.detach().reshape(-1, *A.shape[-2:])
        parts = [_one_by_one(matrix, index, alone=len(flat) == 1) for index, matrix in enumerate(flat)]
        dtypes = (A.dtype, A.real.dtype, A.dtype)
        U, sigma, Vh = (torch.stack(x).to(dtype) for x, dtype in zip(zip(*parts, strict=True), dtypes, strict=True))
        batch = A.shape[:-2]
        return U.reshape(*batch, *U.shape[1:]), sigma.reshape(*batch, -1), Vh.reshape(*batch, *Vh.shape[1:])


def _lapack(A: Tensor) -> Svd:
    return torch.linalg.svd(A, full_matrices=False)


def _float64(A: Tensor) -> Svd:
    return _lapack(widened(A))


def _triangular(A: Tensor) -> Svd:
    Q, R = torch.linalg.qr(widened(A))
    U, sigma, Vh = _lapack(R)
    return Q @ U, sigma, Vh


def _gram(A: Tensor) -> Svd:
    wide = widened(A)
    eigvals, V = torch.linalg.eigh(wide.mH @ wide)
    V = V.flip(-1)
    U, R = torch.linalg.qr(wide @ V)
    signs = torch.sgn(R.diagonal())
    return U * torch.where(signs == 0, torch.ones_like(signs), signs), eigvals.flip(-1).clamp_min(0).sqrt(), V.mH


CHAIN: dict[str, Callable[[Tensor], Svd]] = {"float64": _float64, "triangular factor": _triangular, "gram": _gram}


def _one_by_one(A: Tensor, index: int, *, alone: bool) -> Svd:
    """One matrix of a batch that failed as a whole; one that was alone in it has failed already."""
    if not alone:
        try:
            return _lapack(A)
        except torch.linalg.LinAlgError:
            pass
    for step, decompose in CHAIN.items():
        try:
            parts = decompose(A)
        except torch.linalg.LinAlgError:
            continue
        count_failure(rescued_by=step)
        return parts
    count_failure(rescued_by=None)
    raise DecompositionError(
        f"no singular value decomposition of a finite matrix of shape {tuple(A.shape)} (number {index} of its batch)"
        f"{place()} converged, by torch.linalg.svd or any of {', '.join(CHAIN)}"
    )
