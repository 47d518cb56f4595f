"""Which directions of a covariance are rounding errors, and what is done with them: two tolerances and four policies.

The eigenvalues of a given matrix P (..., d, d) up to d·eps of the largest may be errors of forming and decomposing it
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3; the rule of ``matrix_rank``). Those of a singular
matrix lie anywhere in that band, on either side of zero, so nothing may depend on where they are: functions that need
the inverse refuse them all. The derivative of a root sets to zero only what is within the rounding observed in
practice, (4 + 2√d)·eps: the bound would also discard eigenvalues that are known to two digits.

Features X (..., d, n) determine more. Rounding them to their dtype perturbs the factor A = (X − mean)/√n by E with
‖E‖ ≤ eps/2 · ‖X‖_F/√n, so eigenvalues of P = A Aᴴ below eps² ‖X‖²_F/n can be rounding errors. (The customary max(d,
n)·eps·σ_max would call everything above κ = 4,000 singular at n = 128·32·32 in single precision.) Decomposing A in
double precision adds min(d, n)·eps64 ‖A‖, which matters for double-precision features only: the larger of the two
counts.

The policies for these eigenvalues:

- ``"ridge"``: ε is added to every eigenvalue; with ε = 0 a singular matrix is an error where its inverse is needed.
- ``"pinv"``: the function acts on the range only, as if f(0) = 0.
- ``"floor"``: eigenvalues at or below the tolerance are raised to it.
- ``"raise"``: an eigenvalue at or below the tolerance is an error.

Clamped eigenvalues have no gradient of their own: the derivative is that of the truncated function, by its divided
differences.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.checks import bad_indices, checks_values, hermitian, is_short
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.names import require_known
from wellcond._shared.precision import working_dtype

from .lapack import eigh

Rank = Literal["ridge", "pinv", "floor", "raise"]


def rounding_floor(d: int, dtype: torch.dtype) -> float:
    """How far below zero, relative to the largest, rounding can push an eigenvalue of a d × d matrix.

    Forming the matrix and decomposing it are backward stable: each perturbs by a low multiple of eps·d in norm
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3); 10 covers both.
    """
    return 10 * d * torch.finfo(dtype).eps


def matrix_tolerance(eigvals: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(..., 1) the largest value that is rounding, for a matrix formed in ``dtype`` (default: that of ``eigvals``)."""
    eps = torch.finfo(dtype or eigvals.dtype).eps
    return eigvals.shape[-1] * eps * eigvals.amax(-1, keepdim=True).clamp_min(0.0)


def feature_tolerance(X: Tensor, mean_square: Tensor) -> Tensor:
    """(...,) eigenvalues of the covariance of X up to this value may be rounding errors.

    Args:
        X: (..., d, n); only its shape and dtype matter. Half precision counts as float32, in which it is computed.
        mean_square: ‖X‖²_F/n, including the mean, in the units of the covariance.
    """
    own = torch.finfo(working_dtype(X.dtype)).eps
    return max(own, min(X.shape[-2:]) * torch.finfo(torch.float64).eps) ** 2 * mean_square


def require_rank_policy(rank: str, eps: float) -> None:
    """Raise for an unknown policy, and for an ε that the policy would ignore."""
    require_known(rank, get_args(Rank), "rank policy")
    if rank != "ridge" and eps != 0.0:
        raise ValueError(f"eps={eps} is the ridge of rank='ridge'; rank={rank!r} takes none")


def noise(d: int, dtype: torch.dtype) -> float:
    """How far from zero, relative to the largest, rounding puts a null eigenvalue of a d × d matrix in practice.

    Measured on Gram matrices of rank d − 1 and d/2 and on rotated projectors, d from 4 to 256, up to 4096 samples, 300
    draws each: 7.3 eps at d = 4, 8 at 64, 13.5 at 256.
    """
    return (4 + 2 * d**0.5) * torch.finfo(dtype).eps


def without_noise(eigvals: Tensor) -> Tensor:
    """Ascending eigenvalues, with those within the noise set to 0."""
    return eigvals.masked_fill(eigvals <= noise(eigvals.shape[-1], eigvals.dtype) * eigvals[..., -1:], 0.0)


def clear_of_zero(eigvals: Tensor) -> bool:
    """Whether ascending eigenvalues (..., d) can be read and all exceed every tolerance of this module: the usual case,
    in which there is nothing to refuse, clamp or cut."""
    if not checks_values(eigvals) or not eigvals.numel():
        return False
    d = eigvals.shape[-1]
    return apart(eigvals, 0, -1, max(d, 4 + 2 * d**0.5) * torch.finfo(eigvals.dtype).eps)


def apart(values: Tensor, small: int, large: int, cut: float) -> bool:
    """Whether in each row of ``values``, which can be read, the entry ``small`` exceeds ``cut`` times ``large``."""
    if is_short(values):
        return all(row[small] > cut * row[large] for row in values.reshape(-1, values.shape[-1]).tolist())
    return bool((values[..., small] > cut * values[..., large]).all())


def shifted_spectrum(eigvals: Tensor, eps: float, *, invertible: bool, rank: Rank = "ridge") -> Tensor:
    """max(λ, 0) + ε, or 0 for rounding errors ("pinv"). Raises for an indefinite matrix, and for a singular one where
    its inverse is needed."""
    refuses_singular = rank == "raise" or (rank == "ridge" and invertible and eps == 0.0)
    if checks_values(eigvals) and eigvals.numel():
        lowest = eigvals.amin(-1)
        bad = lowest <= matrix_tolerance(eigvals).squeeze(-1) if refuses_singular else lowest < 0.0
        if bad.any():
            _require_semidefinite(eigvals)
            if refuses_singular:
                raise NotPositiveSemidefiniteError(
                    f"P is singular{bad_indices(bad)}{place()}: its smallest eigenvalue is {lowest.min().item():.3e}, "
                    f"zero up to rounding in {eigvals.dtype} (d·eps of the largest); "
                    "give eps > 0, or rank='pinv' or 'floor'"
                )
    if rank == "pinv":
        return eigvals.masked_fill(eigvals <= matrix_tolerance(eigvals), 0.0)
    return eigvals.clamp_min(0.0).add_(eps) if eps else eigvals.clamp_min(0.0)


def _require_semidefinite(eigvals: Tensor) -> None:
    lowest, largest = eigvals.amin(-1), eigvals.abs().amax(-1)
    indefinite = lowest < -rounding_floor(eigvals.shape[-1], eigvals.dtype) * largest
    if indefinite.any():
        raise NotPositiveSemidefiniteError(
            f"P is indefinite{bad_indices(indefinite)}{place()}: its eigenvalues reach from "
            f"{lowest.min().item():.3e} to {largest.max().item():.3e}, and the negative ones are larger than "
            "rounding; a covariance has none"
        )


class Shift(NamedTuple):
    """How the eigenvalues of a positive semidefinite matrix are prepared for a function."""

    eps: float
    rank: Rank
    invertible: bool


class _Eigenpairs(BatchedFunction):
    """Decomposition, checks and policy in one function, which sees real values under ``torch.func``."""

    @staticmethod
    def forward(P: Tensor, shift: Shift | None, unit: float) -> tuple[Tensor, Tensor]:
        eigvals, U = eigh(hermitian(P, unit=unit))
        if shift is not None:
            eigvals = shifted_spectrum(eigvals, shift.eps, invertible=shift.invertible, rank=shift.rank)
        return eigvals, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None


def eigenpairs(P: Tensor, shift: Shift | None = None, unit: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, shifted if asked) and eigenvectors of Hermitian P, after the checks; no gradient."""
    return _Eigenpairs.call(P, shift, unit)
