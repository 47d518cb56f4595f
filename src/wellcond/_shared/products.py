"""Products of batches of matrices in as few operations as possible: each is a kernel launch on a device."""

from __future__ import annotations

import torch
from torch import Tensor

# The devices on which the maximum norm takes ten times as long as two operations: there it is not vectorised.
SLOW_MAXIMUM_NORM = ("cpu",)


def product(A: Tensor, B: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A @ B without the reshaping that ``matmul`` does even where it is not needed."""
    multiply = torch.bmm if A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] else torch.matmul
    return multiply(A, B, out=out)


def plus_product(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """β C + α A B in one operation; A and B have the same batch shape, C that shape or a single matrix."""
    if A.ndim == 3:
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    if A.ndim == 2:
        return torch.addmm(C, A, B, beta=beta, alpha=alpha)
    shape = (*A.shape[:-1], B.shape[-1])
    C = C if C.ndim == 2 else flat(C)
    return torch.baddbmm(C, flat(A), flat(B), beta=beta, alpha=alpha).reshape(shape)


def flat(A: Tensor) -> Tensor:
    """(batch, m, n) of (..., m, n)."""
    return A if A.ndim == 3 else A.reshape(A.shape[:-2].numel(), *A.shape[-2:])


def identity(P: Tensor) -> Tensor:
    """I (d, d) for matrices (..., d, d)."""
    return torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)


def largest_absolute(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """max |x| over ``dim``, which is kept; NaN and infinity if there are any."""
    if x.device.type in SLOW_MAXIMUM_NORM:
        return x.abs().amax(dim, keepdim=True)
    return torch.linalg.vector_norm(x, float("inf"), dim=dim, keepdim=True)


def positive_or_one(size: Tensor) -> Tensor:
    """``size``, or 1 where it is not positive: a zero matrix divided by it stays zero."""
    return torch.threshold(size, 0.0, 1.0)
