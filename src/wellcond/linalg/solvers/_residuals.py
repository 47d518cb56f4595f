"""Norms of matrices, residuals of computed roots, and the warning when they are large."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from wellcond._shared.checks import bad_indices, checks_values
from wellcond._shared.errors import ApproximateRootWarning, NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import widened
from wellcond._shared.products import identity, largest_absolute, plus_product, positive_or_one, product
from wellcond._shared.torch_internals import is_compiling

from .._rank import matrix_tolerance
from ._solver import Root, Solver, Tensors


def require_scale(scale: Tensor, roots: tuple[Root, ...]) -> None:
    """Raise for the inverse root of a zero matrix, in solvers that do not see the eigenvalues."""
    if "invsqrt" not in roots or is_compiling() or not checks_values(scale):
        return
    if (scale <= 0).any():
        raise NotPositiveSemidefiniteError(
            f"P is zero{bad_indices((scale <= 0)[..., 0, 0])}{place()}, so P^(-1/2) does not exist; give eps > 0"
        )


def frobenius_norm(P: Tensor) -> Tensor:
    """‖P‖_F as (..., 1, 1) without overflow: squares of entries beyond 1e19 or below 1e-19 leave float32."""
    if P.shape[-1] == 0:
        return P.real.new_zeros(*P.shape[:-2], 1, 1)
    largest = positive_or_one(largest_entry(P.detach()))
    return torch.linalg.matrix_norm(P / largest, keepdim=True) * largest


def largest_entry(P: Tensor) -> Tensor:
    """max |Pij| as (..., 1, 1)."""
    return largest_absolute(P, (-2, -1))


def relative_residual(P: Tensor, root: Tensor, which: Root, eps: float) -> Tensor:
    """(...,) ‖Q² − P‖/‖P‖ of a square root Q, ‖S P S − I‖/‖I‖ of an inverse one; Frobenius norms, P + εI for P."""
    eye = identity(P)
    if eps:
        P = torch.add(P, eye, alpha=eps)
    if which == "sqrt":
        return (frobenius_norm(plus_product(P, root, root, beta=-1.0)) / positive_or_one(frobenius_norm(P)))[..., 0, 0]
    rest = plus_product(eye, product(root, P), root, beta=-1.0)
    return torch.linalg.matrix_norm(rest) / max(P.shape[-1], 1) ** 0.5


def error_along_eigenvectors(P: Tensor, root: Tensor, which: Root, eps: float) -> Tensor:
    """(...,) max_i |uᵢᴴ Q uᵢ/√λᵢ − 1| of a square root Q of P + εI over eigenvalues that are not rounding errors; with
    1/√λᵢ for an inverse root.

    Small eigenvalues hardly contribute to ‖Q² − P‖/‖P‖: Q may be a thousand times too large along their eigenvectors,
    or zero, with a residual of a few percent.
    """
    eigvals, U = torch.linalg.eigh(widened(P))
    eigvals = eigvals + eps
    along = (U.conj() * (widened(root) @ U)).sum(-2).real
    truth = eigvals.clamp_min(0.0).sqrt() if which == "sqrt" else eigvals.clamp_min(0.0).rsqrt()
    error = (along / truth - 1.0).abs()
    return torch.where(eigvals > matrix_tolerance(eigvals, P.dtype), error, 0.0).amax(-1)


def warn_if_far(solver: Solver, P: Tensor, outputs: Tensors, roots: tuple[Root, ...], eps: float) -> None:
    assert solver.tolerance is not None
    solver.times_checked += 1
    measures = {"left a relative residual of {:.2g}": relative_residual}
    if solver.times_checked.bit_count() == 1:  # in the 1st, 2nd, 4th, 8th, … check, as it takes an eigendecomposition
        measures["is off by {:.2g} of itself along an eigenvector"] = error_along_eigenvectors
    for text, measure in measures.items():
        worst = max(measure(P, out, which, eps).max().item() for out, which in zip(outputs, roots, strict=True))
        if not worst <= solver.tolerance:
            solver.has_warned = True
            warnings.warn(
                f"{solver!r} {text.format(worst)}{place()}: this is a damped root, not the root; "
                "take solver='eigh', more steps, or tolerance=None if that is what you want",
                ApproximateRootWarning,
                stacklevel=2,
            )
            return
