"""The largest eigenvalue of Gram matrices, on a device that shall not wait for the host: from matrix products alone.

Eigensolvers of an accelerator report their convergence to the host. Squared k times, and scaled in between, P becomes
P^m / tr P^m with m = 2^k: weights λ_i^m / Σ λ_j^m on the eigenvectors, in the limit a projector Π on those of the
largest eigenvalue, shared equally where it is repeated. The mean of the eigenvalues under these weights is below the
largest by at most d/(e·m) of it (of t^m (1 − t) the maximum is below 1/(e·m), and there are d − 1 such terms), and Π is
its derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def largest_eigenvalue(P: Tensor) -> Tensor:
    """λmax (...,) of Hermitian positive semidefinite P (..., d, d); differentiable, also where it is repeated or 0.

    On the CPU from an eigendecomposition, elsewhere by some log2(d/eps) products.
    """
    if P.device.type == "cpu":
        # Not eigvalsh, whose routine differs with and without a gradient: training and evaluation shall agree.
        return torch.linalg.eigh(P)[0][..., -1]
    return by_products(P)


def by_products(P: Tensor) -> Tensor:
    """The same by repeated squaring, wherever P is."""
    return _ByProducts.apply(P)  # pyright: ignore[reportReturnType]


class _ByProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, P: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        M = _unit_trace(P)
        for _ in range(squarings(P.shape[-1], P.dtype)):
            M = _unit_trace(M @ M)
        ctx.save_for_backward(P, M)
        return (M * P.mT).sum((-2, -1)).real

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, M = ctx.saved_tensors
        if torch.is_grad_enabled():  # the projector is to be differentiated: that of a simple eigenvalue
            u = torch.linalg.eigh(P)[1][..., -1:]
            M = u @ u.mH
        return grad[..., None, None] * M


def squarings(d: int, dtype: torch.dtype) -> int:
    """k such that d/(e·2^k) is below the rounding of the dtype."""
    return max(1, math.ceil(math.log2(d / (math.e * torch.finfo(dtype).eps))))


def _unit_trace(P: Tensor) -> Tensor:
    trace = P.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
    return P / torch.where(trace > 0, trace, 1.0)
