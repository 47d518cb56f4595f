"""The Sylvester equation QX + XQ = G for Hermitian Q, with derivatives of every order.

The derivative of the matrix square root solves this equation, and so does the derivative of its solution (Higham,
Functions of Matrices, 2008, ch. 6). The family of derivatives is closed, and nothing ever divides by the difference of
two eigenvalues.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import hermitian_part, require_matrix
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.products import plus_product, product

from .._rank import eigenpairs
from ._divided_differences import reciprocal_or_zero_


def in_eigenbasis(U: Tensor, K: Tensor, G: Tensor) -> Tensor:
    """U (K ∘ (Uᴴ G U)) Uᴴ, the form of every first derivative of a matrix function (Daleckii–Krein)."""
    return product(product(U, product(product(U.mH, G), U).mul_(K)), U.mH)


class Sylvester(BatchedFunction):
    """X with QX + XQ = G, from the eigenpairs (s, U) of Q; null pairs of Q contribute nothing to X."""

    @staticmethod
    def forward(Q: Tensor, G: Tensor, s: Tensor, U: Tensor) -> Tensor:
        return in_eigenbasis(U, reciprocal_or_zero_(s.unsqueeze(-1) + s.unsqueeze(-2)), G)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Q, _, s, U = inputs
        ctx.save_for_backward(Q, s, U, output)
        ctx.save_for_forward(Q, s, U, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        Q, s, U, X = ctx.saved_tensors
        with full_precision(Q):
            grad_G = sylvester(Q, grad, s, U)
            grad_Q = None
            if ctx.needs_input_grad[0]:
                grad_Q = -hermitian_part(plus_product(product(grad_G, X.mH), X.mH, grad_G))
        return grad_Q, grad_G, None, None

    @staticmethod
    def jvp(ctx: Any, dQ: Tensor | None, dG: Tensor | None, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        Q, s, U, X = ctx.saved_tensors
        with full_precision(Q):
            right = torch.zeros_like(X) if dG is None else dG
            if dQ is not None:
                dQ = hermitian_part(dQ)
                right = right - (dQ @ X + X @ dQ)
            return sylvester(Q, right, s, U)


def sylvester(Q: Tensor, G: Tensor, s: Tensor, U: Tensor) -> Tensor:
    """X with QX + XQ = G, from the eigenpairs (s, U) of Q; differentiable in Q and G to every order."""
    if not differentiated_again():
        return Sylvester.forward(Q, G, s, U)
    return Sylvester.call(Q, G, s, U)


def lyapunov(Q: Tensor, G: Tensor) -> Tensor:
    """Solve the Lyapunov equation QX + XQ = G.

    If two eigenvalues of Q sum to zero, the equation has no solution or many; the result is the solution of minimum
    norm on the other pairs.

    Args:
        Q: (..., d, d) Hermitian, any floating or complex dtype.
        G: (..., d, d), batch dimensions broadcast with those of Q; need not be Hermitian.

    Returns:
        (..., d, d) in the promoted dtype of Q and G; half precision is computed in float32.

    Raises:
        TypeError: Q or G is not a floating or complex tensor.
        ValueError: Q or G is not square, shapes that do not fit, or a Q that is not finite or not Hermitian (checked on
            the CPU by default).

    Complexity: one eigendecomposition and four products, O(d³) per matrix. Each further derivative costs four more
    products. Source: Higham, Functions of Matrices, 2008, ch. 6; Bartels and Stewart 1972 for the equation.

    Example:
        >>> import torch
        >>> Q, G = torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2, 2)
        >>> lyapunov(Q, G)
        tensor([[0.5000, 0.2500],
                [0.2500, 0.1667]])
    """
    require_matrix(Q, "Q", square=True)
    require_matrix(G, "G", square=True)
    if Q.shape[-1] != G.shape[-1]:
        raise ValueError(f"Q and G must have the same size, got {tuple(Q.shape)} and {tuple(G.shape)}")
    dtype = torch.promote_types(Q.dtype, G.dtype)
    try:
        batch = torch.broadcast_shapes(Q.shape[:-2], G.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of Q and G must broadcast, got {tuple(Q.shape)} and {tuple(G.shape)}"
        ) from None
    with full_precision(Q):
        Q, G = (x.to(working_dtype(dtype)).expand(*batch, *x.shape[-2:]) for x in (Q, G))
        s, U = eigenpairs(Q)
        return sylvester(hermitian_part(Q), G, s, U).to(dtype)
