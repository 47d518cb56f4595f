"""A thin singular value decomposition that does not crash: the counterpart of ``_eigh``.

If LAPACK's divide and conquer does not converge, each matrix of the batch goes down the chain: float64 → triangular
factor first → eigenpairs of the float64 Gram matrix (whose small singular values keep half of their digits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.events import count_call
from wellcond._shared.precision import widened
from wellcond._shared.torch_internals import outside_the_compiler

from ._batches import in_threads
from ._chain import Chain, one_by_one

Svd = tuple[Tensor, Tensor, Tensor]


@outside_the_compiler
def thin_svd(A: Tensor) -> Svd:
    """U (..., m, n), descending σ (..., n) and Vᴴ (..., n, n) of a tall finite A (..., m, n); not differentiable."""
    count_call()
    refuse_in_onnx("singular value decomposition")
    try:
        return in_threads(_lapack, A)  # pyright: ignore[reportReturnType]
    except torch.linalg.LinAlgError:
        return one_by_one(_lapack, CHAIN.rescue, A.detach())  # pyright: ignore[reportReturnType]


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


CHAIN = Chain(
    "singular value decomposition",
    "torch.linalg.svd",
    {"float64": _float64, "triangular factor": _triangular, "gram": _gram},
)
