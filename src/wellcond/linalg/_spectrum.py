"""A spectrum in float64 with what it can be trusted to, and the figures that are read off it.

Three that are never to be mixed (and all needed): κ(P) of eq. (1) without ε, infinite where the rank is short;
κ(P + εI), what a solver sees; and the effective rank (tr P)²/tr P².
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Eigenvalues of covariances in float64 and what they can be trusted to.

    Attributes:
        eigvals: (..., d) in descending order, never negative.
        tolerance: (...,) eigenvalues at or below it are rounding.
    """

    eigvals: Tensor
    tolerance: Tensor

    @property
    def numerical_rank(self) -> Tensor:
        """(...,) int64 count of eigenvalues above the tolerance."""
        return (self.eigvals > self.tolerance.unsqueeze(-1)).sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """(...,) the participation ratio (tr P)²/tr P², 0 for a zero matrix."""
        # Dividing by the largest keeps the squares inside the range of float64.
        ratio = self.eigvals / self.eigvals.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        return ratio.sum(-1).square() / ratio.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)

    def condition_number(self, eps: float = 0.0) -> Tensor:
        """(...,) κ(P + εI). With ε = 0 it is infinite where P is numerically rank deficient."""
        largest, smallest = self.eigvals[..., 0], self.eigvals[..., -1]
        if eps > 0.0:
            return (largest + eps) / (smallest + eps)
        kappa = largest / smallest.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(smallest > self.tolerance, kappa, torch.inf)

    def range_condition_number(self) -> Tensor:
        """(...,) κ over the numerical range: the largest eigenvalue by the smallest above the tolerance (1 if none)."""
        above = torch.where(self.eigvals > self.tolerance.unsqueeze(-1), self.eigvals, torch.inf).amin(-1)
        return torch.where(torch.isfinite(above), self.eigvals[..., 0] / above, 1.0)
