"""The reference solver: a symmetric eigendecomposition, differentiated by Daleckii and Krein's divided differences.

Forward: eq. (3)–(4) of the paper. Backward: never through 1/(λi − λj) as eq. (7) does, but through 1/(√λi + √λj)
(Higham, Functions of Matrices, 2008, ch. 3), which stays finite at repeated eigenvalues.
"""

from __future__ import annotations

from torch import Tensor

from .._eigh import eigh
from .._rank_policy import shifted_spectrum
from .._sylvester import differentiated_again, in_eigenbasis, reciprocal_or_zero, sylvester
from ._solver import Done, Root, Solver, Tensors


class Eigh(Solver):
    """Exact roots and exact derivatives of every order from one eigendecomposition."""

    name = "eigh"
    cost = "one eigendecomposition (about 9 d³ operations, one core a matrix) and one product; backward four products"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        eigvals, U = eigh(P)
        s = shifted_spectrum(eigvals, eps, invertible="invsqrt" in roots).sqrt()
        values = {"sqrt": s, "invsqrt": reciprocal_or_zero(s)}
        return tuple((U * values[root].unsqueeze(-2)) @ U.mH for root in roots), (s, U)

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        terms = [
            FRECHET[root](output, grad, *done.residuals)
            for root, output, grad in zip(done.roots, done.outputs, grads, strict=True)
            if grad is not None
        ]
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        return (total + total.mH) / 2

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        return tuple(
            FRECHET[root](output, dP, *done.residuals) for root, output in zip(done.roots, done.outputs, strict=True)
        )


def frechet_sqrt(Q: Tensor, G: Tensor, s: Tensor, U: Tensor) -> Tensor:
    """The derivative of P^{1/2} = Q along G, and its adjoint: K_ij = 1/(√λi + √λj)."""
    return sylvester(Q, G, s, U)


def frechet_invsqrt(S: Tensor, G: Tensor, s: Tensor, U: Tensor) -> Tensor:
    """The derivative of P^{-1/2} = S along G, and its adjoint: K_ij = −1/(√λi √λj (√λi + √λj)).

    From S P S = I: dS = −S Y S with SY + YS = S dP S, which autograd can differentiate again through
    :func:`sylvester`; where nobody will, the same in one step.
    """
    t = reciprocal_or_zero(s)
    if differentiated_again():
        return -S @ sylvester(S, S @ G @ S, t, U) @ S
    K = -t.unsqueeze(-1) * t.unsqueeze(-2) * reciprocal_or_zero(s.unsqueeze(-1) + s.unsqueeze(-2))
    return in_eigenbasis(U, K, G)


FRECHET = {"sqrt": frechet_sqrt, "invsqrt": frechet_invsqrt}
