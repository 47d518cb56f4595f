"""The gradient of a Newton–Schulz root by the operations of the iteration itself; not differentiable again.

The iterates are polynomials of A, whose derivative along a Hermitian direction is self-adjoint (Higham, Functions of
Matrices, 2008, ch. 3). So the gradient is the off-diagonal block of the iteration on [[A, E], [0, A]]. Only the first
column of the transposed blocks is kept, [A; E]: a step takes six products, each of one or two blocks, and only A is
needed from the forward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wellcond._shared.products import flat


def along_the_iteration(
    steps: int, root: Literal["sqrt", "invsqrt"], output: Tensor, grad: Tensor, A: Tensor, scale: Tensor
) -> Tensor:
    """The Hermitian gradient of P from that of a root Q = √c Y or S = Z/√c, with A = P/c = P/tr P."""
    d, square = A.shape[-1], root == "sqrt"
    factor = scale.rsqrt() if square else scale.pow(-1.5)
    A = flat(A)
    E = flat((grad + grad.mH) * factor)  # twice the direction
    start = torch.eye(2 * d, d, dtype=A.dtype, device=A.device).mul_(1.5)
    Y = torch.cat([A, E], -2)
    Z = M = torch.sub(start, Y, alpha=0.5)
    for step in range(1, steps + 1):
        if step > 1:
            M = torch.baddbmm(start, Z, Y[:, :d], alpha=-0.5)
            M[:, d:].baddbmm_(Z[:, :d], Y[:, d:], alpha=-0.5)
        if step == steps:
            break
        Y = _times(Y, M)
        Z = M if step == 1 else _times(M, Z)
    # A quarter: one half for the doubled direction, one for the Hermitian part.
    if not square and steps == 1:
        X = M[:, d:] / 4
    else:
        left, right = (Y, M) if square else (M, Z)
        X = torch.bmm(left[:, d:], right[:, :d])
        X.baddbmm_(left[:, :d], right[:, d:], beta=0.25, alpha=0.25)
    # The scale depends on P too, and A does through it.
    sign = 1.0 if square else -1.0
    iterate = flat(output * (factor if square else scale.sqrt()))
    along_scale = (E.conj() * iterate).addcmul_(X.conj(), A, value=-8.0 * sign).sum((-2, -1), keepdim=True).real
    gradient = X + X.mH
    gradient.diagonal(dim1=-2, dim2=-1).add_(along_scale.squeeze(-1), alpha=sign / 4)
    return gradient.reshape(grad.shape)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """The product of two such columns [X; dX]."""
    d = left.shape[-1]
    both = torch.bmm(left, right[:, :d])
    both[:, d:].baddbmm_(left[:, :d], right[:, d:])
    return both


def trace(P: Tensor) -> Tensor:
    """tr P as (..., 1, 1)."""
    return P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def inner(A: Tensor, B: Tensor) -> Tensor:
    """The real inner product Re tr(Aᴴ B) as (..., 1, 1)."""
    return (A.conj() * B).sum((-2, -1), keepdim=True).real
