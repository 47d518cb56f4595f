"""The whitening matrix S = (P + rI)^{-1/2} of a covariance and the adjoint of its derivative, in few operations.

r = max(ε, eps·tr P) (see :mod:`._minimum_ridge`); where the second is larger, r is differentiated too.

By eigendecomposition, with P = U Λ Uᵀ and t = (max(λ, 0) + r)^{-1/2}: S = (U t) Uᵀ, and the divided differences of the
inverse root are −tᵢ² tⱼ²/(tᵢ + tⱼ) (Higham, Functions of Matrices, 2008, ch. 3). Since t > 0 there is no
division by zero. Other solvers use their own forward and backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from wellcond.linalg import Solver
from wellcond.linalg.lapack import eigh
from wellcond.linalg.solvers import Done, Eigh, Solved

from ._minimum_ridge import lacking_ridge

Saved = tuple[Tensor | None, ...]


class InverseRoot(ABC):
    """A way to compute S and the adjoint of its derivative.

    Args:
        solver: of the inverse root.
        eps: ε > 0.
        grows: whether the ridge may be more than ε.
    """

    def __init__(self, solver: Solver, eps: float, *, grows: bool) -> None:
        self.solver, self.eps, self.grows = solver, eps, grows

    @abstractmethod
    def forward(self, P: Tensor) -> tuple[Tensor, Saved]:
        """S of P (G, d, d), and the tensors that :meth:`adjoint` needs."""

    @abstractmethod
    def adjoint(self, saved: Saved, grad: Tensor) -> tuple[Tensor, float]:
        """∂l/∂P from ∂l/∂S (G, d, d), as the product of a Hermitian matrix, which may be overwritten, and a number."""


class ByEigenpairs(InverseRoot):
    """By eigendecomposition, as in the docstring of the module."""

    def forward(self, P: Tensor) -> tuple[Tensor, Saved]:
        eigvals, U = eigh(P)
        trace = None
        positive = eigvals.clamp_min(0.0)
        if self.grows:
            smallest = torch.finfo(P.dtype).eps
            trace = eigvals.sum(-1, keepdim=True).clamp_min_(self.eps / smallest)
            t = positive.add_(trace, alpha=smallest).rsqrt_()
        else:
            t = positive.add_(self.eps).rsqrt_()
        t = t.unsqueeze(-2)
        scaled = U * t
        return torch.bmm(scaled, U.mT), (U, scaled, t, trace)

    def adjoint(self, saved: Saved, grad: Tensor) -> tuple[Tensor, float]:
        U, scaled, t, trace = saved
        assert U is not None and scaled is not None and t is not None
        inner = torch.bmm(torch.bmm(U.mT, grad), U)
        inner = torch.add(inner, inner.mT).div_(t + t.mT)
        outer = scaled * t
        gradient = torch.bmm(torch.bmm(outer, inner), outer.mT)
        if trace is not None:
            _add_trace(gradient, trace > self.eps / torch.finfo(t.dtype).eps)
        return gradient, -0.5


class BySolver(InverseRoot):
    """By any solver, applied to P plus the part of the ridge that ε lacks."""

    def forward(self, P: Tensor) -> tuple[Tensor, Saved]:
        lacking = None
        if self.grows:
            lacking = lacking_ridge(P, self.eps)
            P = P.clone()
            P.diagonal(dim1=-2, dim2=-1).add_(lacking)
        S, *residuals = Solved.forward(P, self.solver, ("invsqrt",), self.eps)
        return S, (P if self.solver.keeps_input else None, lacking, S, *residuals)

    def adjoint(self, saved: Saved, grad: Tensor) -> tuple[Tensor, float]:
        P, lacking, S, *residuals = saved
        done = Done(("invsqrt",), self.eps, P, (S,), tuple(residuals))  # pyright: ignore[reportArgumentType]
        gradient = self.solver.backward(done, (grad,))
        if lacking is not None:
            _add_trace(gradient, lacking > 0.0)
        return gradient, 1.0


class ByProducts(InverseRoot):
    """By a solver that only multiplies, without reading values: the whole ridge is added to the diagonal."""

    def forward(self, P: Tensor) -> tuple[Tensor, Saved]:
        smallest = torch.finfo(P.dtype).eps
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).clamp_min_(self.eps / smallest)
        P = torch.lerp(P, P.mT, 0.5)
        P.diagonal(dim1=-2, dim2=-1).add_(trace, alpha=smallest)
        (S,), residuals = self.solver.forward(P, ("invsqrt",), 0.0)
        return S, (P if self.solver.keeps_input else None, trace, S, *residuals)

    def adjoint(self, saved: Saved, grad: Tensor) -> tuple[Tensor, float]:
        P, trace, S, *residuals = saved
        assert trace is not None
        done = Done(("invsqrt",), 0.0, P, (S,), tuple(residuals))  # pyright: ignore[reportArgumentType]
        gradient = self.solver.backward(done, (grad,))
        _add_trace(gradient, trace > self.eps / torch.finfo(gradient.dtype).eps)
        return gradient, 1.0


def inverse_root(solver: Solver, eps: float, *, grows: bool, reading: bool) -> InverseRoot:
    """The way for a solver; ``reading`` says whether values may be read."""
    if type(solver) is Eigh:
        return ByEigenpairs(solver, eps, grows=grows)
    kind = ByProducts if grows and solver.traceable and not reading else BySolver
    return kind(solver, eps, grows=grows)


def _add_trace(gradient: Tensor, grown: Tensor) -> None:
    """Add the derivative through r = eps·tr P, in the groups (G, 1) where that is the ridge."""
    diagonal = gradient.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(diagonal.sum(-1, keepdim=True).mul_(grown), alpha=torch.finfo(gradient.dtype).eps)
