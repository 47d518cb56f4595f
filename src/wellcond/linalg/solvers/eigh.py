"""The reference solver: a symmetric eigendecomposition, differentiated by Daleckii and Krein's divided differences.

Forward: eq. (3)–(4) of the paper. Backward: not with 1/(λi − λj) as in eq. (7), but with 1/(√λi + √λj)
(Higham, Functions of Matrices, 2008, ch. 3), which is finite at repeated eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again
from wellcond._shared.products import product
from wellcond._shared.torch_internals import along_many_directions

from .._rank import clear_of_zero, noise, shifted_spectrum
from ..derivatives import reciprocal_or_zero, reciprocal_or_zero_, sylvester
from ..lapack import eigh
from ._solver import Done, LyapunovSolver, Root, Tensors


class Eigh(LyapunovSolver):
    """Exact roots and exact derivatives of every order from one eigendecomposition.

    A matrix whose decomposition fails goes down a fall-back chain: scaled, in float64, with a shifted diagonal, by the
    SVD.

    Complexity: one eigendecomposition and a product for each root, O(d³) a matrix; three products backward.
    Source: Higham, Functions of Matrices, 2008, ch. 3 and 6.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])), solver=Eigh())
        tensor([[2., 0.],
                [0., 3.]])
    """

    name = "eigh"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        eigvals, U = eigh(P)
        if clear_of_zero(eigvals):
            kept = s = (eigvals + eps if eps else eigvals).sqrt()
        else:
            kept = s = shifted_spectrum(eigvals, eps, invertible="invsqrt" in roots).sqrt()
            if not eps and "invsqrt" not in roots:
                # Eigenvalues within the noise have a root but no derivative.
                kept = s.masked_fill(s <= noise(s.shape[-1], s.dtype) ** 0.5 * s[..., -1:], 0.0)
        values = [s if root == "sqrt" else reciprocal_or_zero(s) for root in roots]
        return tuple([product(U * value.unsqueeze(-2), U.mH) for value in values]), (kept, U)

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        if not differentiated_again() and not along_many_directions(*grads):
            return _gradient(done, grads)
        return super().backward(done, grads)

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        s, U = done.residuals
        return sylvester(Q, G, s if root == "sqrt" else reciprocal_or_zero(s), U)


def _gradient(done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
    """:meth:`Solver.backward` in one pass through the eigenbasis, without further derivatives.

    Reuses three arrays of the size of the batch: allocating memory costs more than writing a product.
    """
    s, U = done.residuals
    wanted = [(root, grad) for root, grad in zip(done.roots, grads, strict=True) if grad is not None]
    # K/2, as the Hermitian part is taken at the end; negative if only S = Q⁻¹ has a gradient, as dS = −S dQ S.
    half = s * (2.0 if wanted[0][0] == "sqrt" else -2.0)
    pair = reciprocal_or_zero_(half.unsqueeze(-1) + half.unsqueeze(-2))
    inner = left = None
    for root, grad in wanted:
        basis = U if root == "sqrt" else U * reciprocal_or_zero(s).unsqueeze(-2)
        left = product(basis.mH, grad, out=left)
        term = product(left, basis).mul_(pair)
        inner = term if inner is None else inner.sub_(term)
    assert inner is not None
    gradient = product(product(U, inner, out=left), U.mH, out=inner)
    return torch.add(gradient, gradient.mH, out=left)
