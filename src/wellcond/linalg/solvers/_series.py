"""Solvers that expand √(1 − x) at P/‖P‖: their normalisation, and their derivative by Lyapunov iteration."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from wellcond._shared.events import count_call
from wellcond._shared.products import identity, plus_product, positive_or_one

from ._lyapunov_iteration import lyapunov_iteration
from ._minimax_polynomials import NEWTON_SCHULZ
from ._residuals import frobenius_norm, require_scale
from ._solver import Done, LyapunovSolver, Root, Tensors


class SeriesSolver(LyapunovSolver):
    """Roots of P = ‖P‖_F (I − Z) from an expansion in Z, each matrix normalised by its own norm.

    Args:
        order: of the expansion.
        backward_steps: Newton–Schulz steps for the Lyapunov equation of the derivative.
        tolerance: warn once if the relative residual exceeds it, or, in the 1st, 2nd, 4th, 8th, … call, the relative
            error along an eigenvector (``None``: never); checked when values are.
    """

    default_order: ClassVar[int]
    traceable = True
    order: int
    backward_steps: int
    tolerance: float | None

    def __init__(self, order: int | None = None, backward_steps: int = 8, tolerance: float | None = 0.1) -> None:
        order = self.default_order if order is None else order
        if order < 1 or backward_steps < 1:
            raise ValueError(f"order and backward_steps must be positive, got {order} and {backward_steps}")
        self.order, self.backward_steps, self.tolerance = order, backward_steps, tolerance

    def __repr__(self) -> str:
        return f"{type(self).__name__}(order={self.order}, backward_steps={self.backward_steps})"

    @abstractmethod
    def expand(self, Z: Tensor, root: Root) -> Tensor:
        """(I − Z)^{1/2} or its inverse."""

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        count_call()
        eye = identity(P)
        if eps:
            P = torch.add(P, eye, alpha=eps)
        norm = frobenius_norm(P)
        require_scale(norm, roots)
        Z = eye - P / positive_or_one(norm)
        power = {"sqrt": torch.sqrt, "invsqrt": torch.rsqrt}
        return tuple(self.expand(Z, root) * power[root](norm) for root in roots), ()

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        return lyapunov_iteration(Q, G, [NEWTON_SCHULZ] * self.backward_steps)


def evaluate_polynomial(coefficients: list[float], Z: Tensor) -> Tensor:
    """Σ c_k Z^k by Horner's rule."""
    eye = identity(Z)
    if len(coefficients) == 1:
        return coefficients[0] * eye.expand_as(Z)
    total = torch.add(coefficients[-2] * eye, Z, alpha=coefficients[-1])
    for c in reversed(coefficients[:-2]):
        total = plus_product(eye, total, Z, beta=c)
    return total
