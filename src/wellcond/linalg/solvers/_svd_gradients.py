"""Gradients of the singular value decomposition: 1/(λi − λj) itself, and its published remedies.

Eq. (7) takes the gradient through the eigenvectors, U (Kᵀ ∘ Uᴴ ∂l/∂U) Uᴴ with K_ij = 1/(λi − λj), which is infinite
where eigenvalues repeat. Song, Sebe and Wang ("Why approximate matrix square root outperforms accurate SVD in global
covariance pooling?", ICCV 2021, arXiv 2105.02498) compare them; the defaults are those of their released code.
Most of them write K_ij = 1/λi · 1/(1 − x) for λi > λj, with x = λj/λi and K antisymmetric, and replace the second
factor by some r(x). In the gradient of a root this multiplies the contribution of the pair (i, j) to the exact gradient
by φ = r(x) (1 − x). Ideally φ is 1 for well-separated eigenvalues and 0 at repeated ones, where the contribution
depends on the arbitrary basis of the eigenspace. Where 0 ≤ φ ≤ 1 the gradient is at most as large as the exact one; the
bound on K limits the amplification of rounding errors:

=================  ===========================================  ======================  ============
gradient           r(x), or what it is                          φ                       |K_ij| ≤
=================  ===========================================  ======================  ============
analytic           1/(1 − x)                                    1                       infinite
overflow_check     1/(1 − x)                                    1, and 0 where x = 1    finite ones
pade               1/(1 − x), every approximant of itself       1, and 0 where x = 1    finite ones
taylor             1 + x + … + x^k                              1 − x^(k+1)             (k + 1)/λi
power_iteration    the same, or one term less                   see there, in [−2, 2]   (k + 1)/λi
truncated          K clipped to [−bound, bound]                 min(1, bound (λi − λj)) bound
top_n              1/(1 − x) of the first n, λ = 0 behind them  see there               finite ones
newton_schulz      the gradient of another function             —                       —
=================  ===========================================  ======================  ============

Differences from the released code. There, eigenvalues below the machine epsilon of float64 are raised to it, in the
root as well and whatever the scale of P; here, eigenvalues below eps times the largest are raised to that, in the
gradient only, so that all gradients belong to the same root. There, both entries of an exactly tied pair have the same
sign, which gives a gradient of 2 r(1)/√λ; here K is antisymmetric there too. There, infinite entries are replaced by
the largest finite entry of the whole batch, in K and in its products; here by that of the matrix, in K only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..derivatives import pairs
from ._solver import Done


@dataclass(frozen=True)
class Analytic:
    """Eq. (5)–(7) as published (with the misprints of eq. (5) and (6) corrected)."""

    name: ClassVar[str] = "analytic"

    def spectrum(self, eigvals: Tensor) -> Tensor:
        """The eigenvalues (..., d) at which the derivative is evaluated."""
        return eigvals

    def power(self, eigvals: Tensor, exponent: float) -> Tensor:
        """λ^exponent."""
        return eigvals.pow(exponent)

    def reciprocal_gaps(self, eigvals: Tensor) -> Tensor:
        """K_ij = 1/(λi − λj) as (..., d, d), 0 on the diagonal."""
        difference = eigvals.unsqueeze(-1) - eigvals.unsqueeze(-2)
        off_diagonal = ~torch.eye(eigvals.shape[-1], dtype=torch.bool, device=eigvals.device)
        return torch.where(off_diagonal, 1 / difference, 0.0)

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The gradient of P; the caller takes its Hermitian part."""
        eigvals, U = done.residuals
        eigvals = self.spectrum(eigvals)
        grad_U, grad_eigvals = torch.zeros_like(U), torch.zeros_like(eigvals)
        for root, grad in zip(done.roots, grads, strict=True):
            if grad is None:
                continue
            power = 0.5 if root == "sqrt" else -0.5
            grad_U = grad_U + (grad + grad.mH) @ U * self.power(eigvals, power).unsqueeze(-2)  # eq. (5)
            inside = (U.mH @ grad @ U).diagonal(dim1=-2, dim2=-1).real
            grad_eigvals = grad_eigvals + power * self.power(eigvals, power - 1) * inside  # eq. (6)
        K = self.reciprocal_gaps(eigvals)
        inner = K.mT * (U.mH @ grad_U) + torch.diag_embed(grad_eigvals).to(U.dtype)
        return U @ inner @ U.mH  # eq. (7)


@dataclass(frozen=True)
class Remedy(Analytic):
    """An antisymmetric K from the larger and the smaller eigenvalue of each pair; finite on a singular matrix."""

    def spectrum(self, eigvals: Tensor) -> Tensor:
        return torch.maximum(eigvals, torch.finfo(eigvals.dtype).eps * eigvals.amax(-1, keepdim=True))

    def power(self, eigvals: Tensor, exponent: float) -> Tensor:
        return torch.where(eigvals > 0, eigvals.pow(exponent), 0.0)

    def reciprocal_gaps(self, eigvals: Tensor) -> Tensor:
        a, b = pairs(eigvals)
        index = torch.arange(eigvals.shape[-1], device=eigvals.device)
        # Eigenvalues are in descending order; in a tied pair the first counts as the larger.
        leads = (a > b) | ((a == b) & (index[:, None] < index))
        size = self.size(torch.maximum(a, b), torch.minimum(a, b), leads)
        return torch.where(index[:, None] == index, 0.0, torch.where(leads, size, -size))

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        """|K_ij| of eigenvalues ``large`` ≥ ``small`` ≥ 0; ``leads`` says whether λi is the large one."""
        raise NotImplementedError
