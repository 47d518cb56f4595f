"""A symmetric eigendecomposition that does not crash: finite matrices go down a fall-back chain, and each is counted.

The chain for a matrix whose first decomposition did not converge or was not finite:
scaled by its largest entry → float64 → a diagonal shift relative to the trace → the singular value decomposition.
NaN and infinity in the input are errors that name the layer; they never reach LAPACK.

All of it works under ``torch.func.vmap``, where a failure is still that of one matrix, and inside ``torch.compile``,
which breaks its graph here (see ``_compiler``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from wellcond._shared.checks import checks_values
from wellcond._shared.errors import DecompositionError
from wellcond._shared.events import count_call, count_failure, place
from wellcond._shared.precision import widened
from wellcond._shared.torch_internals import outside_the_compiler

from ._batches import in_threads

EigenPair = tuple[Tensor, Tensor]

_gives_nan: ContextVar[bool] = ContextVar("gives_nan", default=False)


@contextmanager
def nan_for_failures() -> Iterator[None]:
    """In this block a matrix that no step of the chain can decompose gives NaN instead of an error."""
    token = _gives_nan.set(True)
    try:
        yield
    finally:
        _gives_nan.reset(token)


@outside_the_compiler
def eigh(P: Tensor) -> EigenPair:
    """Eigenvalues (ascending) and eigenvectors of ``P`` (..., d, d), finite and exactly Hermitian, with the
    fall-back chain.

    Not differentiable by itself: callers differentiate the function of the matrix, not the decomposition.
    """
    count_call()
    try:
        eigvals, eigvecs = in_threads(torch.linalg.eigh, P)
    except torch.linalg.LinAlgError:
        return _each_matrix(P)
    # Eigenvectors have entries up to 1, so their sum is finite exactly when they all are; that of the eigenvalues may
    # overflow, which only costs the closer look.
    if checks_values(P) and not math.isfinite(abs(eigvecs.sum().item()) + eigvals.sum().item()):
        good = torch.isfinite(eigvals).all(-1) & torch.isfinite(eigvecs).all(-1).all(-1)
        if not good.all():
            _mend(P, eigvals, eigvecs, good)
    return eigvals, eigvecs


def _each_matrix(P: Tensor) -> EigenPair:
    """Decompose a batch in which some matrix failed one by one, so that only the bad ones are retried."""
    eigvals = P.new_zeros(P.shape[:-1], dtype=P.real.dtype)
    eigvecs = torch.zeros_like(P)
    good = torch.zeros(P.shape[:-2], dtype=torch.bool, device=P.device)
    for index in _indices(good) if good.numel() > 1 else []:
        try:
            eigvals[index], eigvecs[index] = torch.linalg.eigh(P[index])
        except torch.linalg.LinAlgError:
            continue
        good[index] = torch.isfinite(eigvals[index]).all() & torch.isfinite(eigvecs[index]).all()
    _mend(P, eigvals, eigvecs, good)
    return eigvals, eigvecs


def _mend(P: Tensor, eigvals: Tensor, eigvecs: Tensor, good: Tensor) -> None:
    """Replace, in place, the decompositions that are not good by the first step of the chain that succeeds."""
    for index in _indices(good):
        if good[index]:
            continue
        for step, decompose in CHAIN.items():
            try:
                pair = decompose(P[index])
            except torch.linalg.LinAlgError:
                continue
            if torch.isfinite(pair[0]).all() and torch.isfinite(pair[1]).all():
                count_failure(rescued_by=step)
                eigvals[index], eigvecs[index] = pair[0].to(eigvals.dtype), pair[1].to(eigvecs.dtype)
                break
        else:
            count_failure(rescued_by=None)
            if _gives_nan.get():
                eigvals[index], eigvecs[index] = torch.nan, torch.nan
                continue
            raise DecompositionError(
                f"no eigendecomposition of a finite {P.shape[-1]} x {P.shape[-1]} matrix"
                f"{f' at batch index {index}' if index else ''}{place()} converged, "
                f"by torch.linalg.eigh or any of {', '.join(CHAIN)}; its largest entry is "
                f"{P[index].abs().max().item():.3e}"
            )


def _indices(flags: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.ones_like(flags).nonzero().tolist()] if flags.ndim else [()]


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
    # Shifted to be positive definite, a Hermitian matrix has its eigenvalues for singular values.
    d = P.shape[-1]
    wide = widened(P)
    shift = torch.linalg.matrix_norm(wide)
    U, s, _ = torch.linalg.svd(wide + shift * torch.eye(d, device=P.device, dtype=wide.dtype))
    return s.flip(-1) - shift, U.flip(-1)


CHAIN: dict[str, Callable[[Tensor], EigenPair]] = {
    "scaled": _scaled,
    "float64": _float64,
    "diagonal shift": _shifted,
    "svd": _by_svd,
}
