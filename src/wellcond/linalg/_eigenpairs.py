"""The eigenpairs of a Hermitian matrix as constants of the derivative: what our derivatives are written in.

Decomposition, checks and rank policy sit inside one autograd function, so that they see real values under every
transform of ``torch.func``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.checks import hermitian

from ._rank_policy import Rank, shifted_spectrum
from .lapack import eigh


class Shift(NamedTuple):
    """How the eigenvalues of a positive semidefinite matrix are made fit for a function; see ``_rank_policy``."""

    eps: float
    rank: Rank
    invertible: bool


class _Eigenpairs(BatchedFunction):
    @staticmethod
    def forward(P: Tensor, shift: Shift | None) -> tuple[Tensor, Tensor]:
        eigvals, U = eigh(hermitian(P))
        if shift is not None:
            eigvals = shifted_spectrum(eigvals, shift.eps, invertible=shift.invertible, rank=shift.rank)
        return eigvals, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None


def eigenpairs(P: Tensor, shift: Shift | None = None) -> tuple[Tensor, Tensor]:
    """Checked eigenvalues (ascending, shifted if asked) and eigenvectors of Hermitian P, not differentiable."""
    return _Eigenpairs.call(P, shift)
