"""A function of a covariance differentiated through its factor, on the smaller side of it.

With the thin SVD A = U Σ Vᴴ the covariance P = A Aᴴ vanishes outside the range of U, so f(P + εI) is
f(ε) I + U (f(Σ² + ε) − f(ε)) Uᴴ. The gradient in A is 2 L A with L = Ũ (f[λi, λj] ∘ ŨᴴGŨ) Ũᴴ over a full basis Ũ
(Daleckii and Krein 1965), of which only the columns in the range of A are needed:

    ∂l/∂A = 2 [U ((K − 1 kᵀ) ∘ UᴴGU) + G U diag(k)] Σ Vᴴ,   K_ij = f[σi² + ε, σj² + ε],  k_j = f[σj² + ε, ε].

All of it is done in double precision, where the Gram matrix resolves κ(P) up to 1e14, and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import bad_indices, checks_values, require_finite
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import full_precision

from ._daleckii_krein import derivative_along
from ._divided_differences import SpectralMap
from ._eigenpairs import eigenpairs
from ._sylvester import in_eigenbasis, reciprocal_or_zero
from .lapack import eigh


class FactorFunction(BatchedFunction):
    """f(A Aᴴ + εI) of a factor A in double precision, differentiated in A; ``precision`` is that of the features."""

    @staticmethod
    def forward(
        A: Tensor, f: SpectralMap, eps: float, singular_is_error: bool, precision: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if checks_values(A):
            require_finite(A, "X")
        few = A.shape[-1] < A.shape[-2]
        gram = A.mH @ A if few else A @ A.mH
        eigvals, basis = eigh((gram + gram.mH) / 2)
        eigvals = _without_rounding(eigvals, _cut(A, precision))
        if singular_is_error:
            _refuse_singular(A, eigvals, few)
        if not few:
            return (basis * f.values(eigvals + eps).unsqueeze(-2)) @ basis.mH, eigvals, basis
        U = A @ (basis * reciprocal_or_zero(eigvals.sqrt()).unsqueeze(-2))
        values = f.values(_with_null(eigvals) + eps)
        base = values[..., -1:]
        inside = (U * (values[..., :-1] - base).unsqueeze(-2)) @ U.mH
        return inside + torch.diag_embed(base.expand(*base.shape[:-1], A.shape[-2])), eigvals, basis

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        A, ctx.f, ctx.eps, _, ctx.precision = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, *output[1:])
        ctx.save_for_forward(A, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None, None, None
        A, eigvals, basis = ctx.saved_tensors
        with full_precision(A):
            G = (grad + grad.mH) / 2
            exact = _gradient(A, G, ctx.f, ctx.eps, eigvals, basis)
            if differentiated_again():
                # The same as a differentiable expression of A and G, which keeps the one above as its value.
                again = 2 * _along(A, G, ctx, eigvals, basis) @ A
                exact = again + (exact - again).detach()
            return exact, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, eigvals, basis = ctx.saved_tensors
        with full_precision(A):
            half = dA @ A.mH
            return _along(A, half + half.mH, ctx, eigvals, basis), None, None


def _refuse_singular(A: Tensor, eigvals: Tensor, few: bool) -> None:
    if few:
        singular = torch.ones(A.shape[:-2], dtype=torch.bool, device=A.device)
    elif checks_values(A):
        singular = (eigvals == 0).any(-1)
    else:
        return
    if singular.any():
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding"
            f"{'' if few else bad_indices(singular)}{place()}; give eps > 0, or rank='pinv'"
        )


def _cut(A: Tensor, precision: float) -> float:
    """Eigenvalues at or below this part of the largest are zero: rounding of the features, or of their Gram matrix."""
    return max(A.shape[-2:]) * max(10 * torch.finfo(A.dtype).eps, precision**2)


def _without_rounding(eigvals: Tensor, cut: float) -> Tensor:
    return torch.where(eigvals > cut * eigvals[..., -1:], eigvals, 0.0)


def _with_null(eigvals: Tensor) -> Tensor:
    """The spectrum with one more eigenvalue 0, which stands for all directions outside the range."""
    return torch.nn.functional.pad(eigvals, (0, 1))


def _gradient(A: Tensor, G: Tensor, f: SpectralMap, eps: float, eigvals: Tensor, basis: Tensor) -> Tensor:
    if A.shape[-1] >= A.shape[-2]:
        return 2 * in_eigenbasis(basis, f.differences(eigvals + eps), G) @ A
    sigma = eigvals.sqrt()
    U = A @ (basis * reciprocal_or_zero(sigma).unsqueeze(-2))
    K = f.differences(_with_null(eigvals) + eps)
    K, k = K[..., :-1, :-1], K[..., -1:, :-1]
    GU = G @ U
    return 2 * ((U @ ((K - k) * (U.mH @ GU)) + GU * k) * sigma.unsqueeze(-2)) @ basis.mH


def _along(A: Tensor, E: Tensor, ctx: Any, eigvals: Tensor, basis: Tensor) -> Tensor:
    """The derivative of f at P + εI along Hermitian E, differentiable in A and E."""
    P = A @ A.mH
    if A.shape[-1] < A.shape[-2]:
        eigvals, basis = eigenpairs(P)
        eigvals = _without_rounding(eigvals, _cut(A, ctx.precision))
    return derivative_along(P, E, ctx.f, eigvals + ctx.eps, basis)
