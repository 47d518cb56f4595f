"""A symmetric eigendecomposition that does not crash: failures on finite matrices go down a fall-back chain.

The chain for a matrix whose first decomposition did not converge or was not finite:
scaled by its largest entry → float64 → a diagonal shift relative to the trace → the singular value decomposition.
Each failure is counted. NaN and infinity in the input are errors that name the layer; they never reach LAPACK.

This works under ``torch.func.vmap``, where a failure still concerns a single matrix, and in ``torch.compile``, which
breaks its graph here (see ``outside_the_compiler``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from wellcond._shared.checks import checks_values, is_short, refuse_in_onnx
from wellcond._shared.errors import DecompositionError
from wellcond._shared.events import count_call
from wellcond._shared.precision import widened
from wellcond._shared.torch_internals import outside_the_compiler

from ._batches import in_threads
from ._chain import Chain, Index, one_by_one

EigenPair = tuple[Tensor, Tensor]

_gives_nan: ContextVar[bool] = ContextVar("gives_nan", default=False)


@contextmanager
def nan_for_failures() -> Iterator[None]:
    """In this block, a matrix that no step of the chain can decompose gives NaN instead of an error."""
    token = _gives_nan.set(True)
    try:
        yield
    finally:
        _gives_nan.reset(token)


@outside_the_compiler
def eigh(P: Tensor) -> EigenPair:
    """Eigenvalues (ascending) and eigenvectors of ``P`` (..., d, d), finite and exactly Hermitian, with the
    fall-back chain.

    Not differentiable: callers differentiate the function of the matrix, not the decomposition.
    """
    count_call()
    refuse_in_onnx("eigendecomposition")
    try:
        eigvals, eigvecs = in_threads(torch.linalg.eigh, P)
    except torch.linalg.LinAlgError:
        return one_by_one(torch.linalg.eigh, _rescue, P.detach())  # pyright: ignore[reportReturnType]
    # Entries of eigenvectors are at most 1, so their sum is finite exactly if they all are. The sum of the eigenvalues
    # may overflow, which only leads to the closer look.
    if checks_values(P) and not math.isfinite(abs(eigvecs.sum().item()) + _total(eigvals)):
        good = torch.isfinite(eigvals).all(-1) & torch.isfinite(eigvecs).all(-1).all(-1)
        for index in map(tuple, (~good).nonzero().tolist()):
            eigvals[index], eigvecs[index] = _rescue(P[index], index)
    return eigvals, eigvecs


def _total(eigvals: Tensor) -> float:
    return sum(eigvals.reshape(-1).tolist()) if is_short(eigvals) else eigvals.sum().item()


def _rescue(P: Tensor, index: Index) -> EigenPair:
    try:
        eigvals, eigvecs = CHAIN.rescue(P, index)
    except DecompositionError:
        if not _gives_nan.get():
            raise
        return torch.full_like(P[0].real, torch.nan), torch.full_like(P, torch.nan)
    return eigvals, eigvecs


def _scaled(P: Tensor) -> EigenPair:
    scale = P.abs().max().clamp_min(torch.finfo(P.real.dtype).tiny)
    eigvals, eigvecs = torch.linalg.eigh(P / scale)
    return eigvals * scale, eigvecs


def _float64(P: Tensor) -> EigenPair:
    return _scaled(widened(P))


def _shifted(P: Tensor) -> EigenPair:
    d = P.shape[-1]
    shift = P.diagonal(dim1=-2, dim2=-1).real.abs().sum() / d * torch.finfo(P.real.dtype).eps
    wide = widened(P)
    eigvals, eigvecs = _scaled(wide + shift.double() * torch.eye(d, device=P.device, dtype=wide.dtype))
    return eigvals - shift.double(), eigvecs


def _by_svd(P: Tensor) -> EigenPair:
    # Once shifted to be positive definite, the singular values of a Hermitian matrix are its eigenvalues.
    d = P.shape[-1]
    wide = widened(P)
    shift = torch.linalg.matrix_norm(wide)
    U, s, _ = torch.linalg.svd(wide + shift * torch.eye(d, device=P.device, dtype=wide.dtype))
    return s.flip(-1) - shift, U.flip(-1)


CHAIN = Chain(
    "eigendecomposition",
    "torch.linalg.eigh",
    {"scaled": _scaled, "float64": _float64, "diagonal shift": _shifted, "svd": _by_svd},
)
