"""Functions of a spectrum in which a rank policy replaces the eigenvalues that are rounding errors."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rank import Rank, matrix_tolerance, without_noise
from ._divided_differences import Power, ScalarFunction, SpectralMap, pairs, triples


class Truncated(SpectralMap):
    """f, with eigenvalues that are rounding errors mapped to f(tolerance) ("floor") or to 0 ("pinv").

    With ``fixed_range`` the null space is the same for all matrices in question, so nothing couples it to the range.
    """

    f: ScalarFunction
    floor: bool
    fixed_range: bool

    def __init__(self, f: ScalarFunction, rank: Rank, *, fixed_range: bool = False) -> None:
        self.f, self.floor, self.fixed_range = f, rank == "floor", fixed_range

    def _split(self, eigvals: Tensor) -> tuple[Tensor, Tensor]:
        """Which eigenvalues are kept, and the spectrum with a harmless value in place of the others."""
        # For "pinv" these eigenvalues have been set to zero already, by the tolerance that applies.
        cut = matrix_tolerance(eigvals) if self.floor else torch.zeros_like(eigvals[..., :1])
        kept = eigvals > cut
        return kept, torch.where(kept, eigvals, torch.where(cut > 0, cut, 1.0))

    def values(self, eigvals: Tensor) -> Tensor:
        kept, safe = self._split(eigvals)
        values = self.f.value(safe)
        # A zero matrix has no scale for a floor: it maps to zero, as under the pseudo-inverse.
        return torch.where(kept | (self.floor & kept.any(-1, keepdim=True)), values, 0.0)

    def differences(self, eigvals: Tensor) -> Tensor:
        kept, safe = self._split(eigvals)
        (ki, kj), (si, sj) = pairs(kept), pairs(safe)
        return self._mixed(self.f.first(si, sj), (ki & kj), (ki | kj), *pairs(eigvals), *pairs(self.values(eigvals)))

    def second_differences(self, eigvals: Tensor) -> Tensor:
        kept, safe = self._split(eigvals)
        ki, kj, kk = triples(kept)
        lam = torch.stack(torch.broadcast_tensors(*triples(eigvals)))
        lam, order = lam.sort(0)
        values = torch.stack(torch.broadcast_tensors(*triples(self.values(eigvals)))).gather(0, order)
        keep = torch.stack(torch.broadcast_tensors(ki, kj, kk)).gather(0, order)
        safe3 = torch.stack(torch.broadcast_tensors(*triples(safe))).gather(0, order)

        def first(i: int, j: int) -> Tensor:
            inner = self.f.first(safe3[i], safe3[j])
            return self._mixed(inner, keep[i] & keep[j], keep[i] | keep[j], lam[i], lam[j], values[i], values[j])

        return self._mixed(
            self.f.second(*triples(safe)), ki & kj & kk, ki | kj | kk, lam[2], lam[0], first(2, 1), first(1, 0)
        )

    def _mixed(
        self, whole: Tensor, every: Tensor, some: Tensor, a: Tensor, b: Tensor, fa: Tensor, fb: Tensor
    ) -> Tensor:
        """f's divided difference where all are kept, 0 where none is, and the quotient across the cut."""
        if self.fixed_range:
            return torch.where(every, whole, 0.0)
        gap = torch.where(a == b, 1.0, a - b)
        return torch.where(every, whole, torch.where(some, (fa - fb) / gap, 0.0))


class RootAtZero(SpectralMap):
    """A fractional power of a matrix that may be singular: its value uses every eigenvalue; its derivative, which does
    not exist at zero, only those above the noise."""

    def __init__(self, f: Power) -> None:
        self.f = f

    def values(self, eigvals: Tensor) -> Tensor:
        return self.f.values(eigvals)

    def differences(self, eigvals: Tensor) -> Tensor:
        return self.f.differences(without_noise(eigvals))

    def second_differences(self, eigvals: Tensor) -> Tensor:
        return self.f.second_differences(without_noise(eigvals))


def under_policy(f: ScalarFunction, rank: Rank, eps: float) -> SpectralMap:
    """f under a rank policy, for the eigenvalues of a given matrix."""
    if rank == "ridge" and eps == 0.0 and isinstance(f, Power) and 0.0 < f.exponent < 1.0:
        return RootAtZero(f)
    return on_kept_eigenvalues(f, rank)


def on_kept_eigenvalues(f: ScalarFunction, rank: Rank) -> SpectralMap:
    """f under a rank policy, for eigenvalues in which rounding errors are already zero under "pinv"."""
    return Truncated(f, rank) if rank in ("pinv", "floor") else f
