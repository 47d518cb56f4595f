"""A function of a covariance from its features, as an autograd function: the factor form of ``_factor_derivatives``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import bad_indices, checks_values, hermitian_part, require_finite
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import full_precision, widened
from wellcond._shared.products import product

from ._covariance import centred_factor
from ._factor import Factor, factorise
from ._factor_derivatives import (
    Options,
    along,
    change,
    differentiable_gradient,
    gradient,
    inner_power,
    is_basis,
    is_bounded,
    vanishes_at_zero,
    with_null,
)


class FactorFunction(BatchedFunction):
    """f(A Aᴴ + εI) with the factor A of features X in the working dtype, differentiable in X."""

    @staticmethod
    def forward(X: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if checks_values(X) and not math.isfinite(abs(X.sum().item())):
            require_finite(X, "X")
        f, eps = options.f, options.eps
        eigvals, U, V = factorise(X, options.correction)
        if options.singular_is_error:
            _refuse_singular(X, eigvals)
        if is_bounded(f) and V.numel():  # nothing amplifies rounding errors: the working dtype is enough
            U, V = U.to(X.dtype), V.to(X.dtype)
        if is_basis(U) or vanishes_at_zero(options):
            values = f.values(eigvals + eps if eps else eigvals).to(U.real.dtype)
            return product(U * values.unsqueeze(-2), U.mH).to(X.dtype), eigvals, U, V
        values = f.values(with_null(eigvals) + eps)
        base = values[..., -1:]
        inside = product(U * (values[..., :-1] - base).to(U.real.dtype).unsqueeze(-2), U.mH)
        outside = torch.diag_embed(base.expand(*base.shape[:-1], U.shape[-2]))
        return (inside + outside).to(X.dtype), eigvals, U, V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        X, ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(X, *output[1:])
        ctx.save_for_forward(X, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None
        X, *factor = ctx.saved_tensors
        with full_precision(X):
            G = hermitian_part(grad)
            exact = gradient(X, G, ctx.options, Factor(*factor))
            if differentiated_again():
                # The same as a differentiable expression of X and G, with the more accurate value from above.
                again = differentiable_gradient(X, G, ctx.options, Factor(*factor))
                exact = again + (exact - again).detach()
            return exact, None

    @staticmethod
    def jvp(ctx: Any, dX: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        X, *saved = ctx.saved_tensors
        options, factor = ctx.options, Factor(*saved)
        with full_precision(X):
            A, dA = (centred_factor(widened(x), options.correction) for x in (X, dX))
            if (inner := inner_power(A, options, factor)) is not None:
                S, move = inner
                half = dA @ S @ A.mH
                moved = half + half.mH + A @ move(dA.mH @ A + A.mH @ dA) @ A.mH
            else:
                half = dA @ A.mH
                moved = along(A, half + half.mH, options, factor)
            if factor.V.numel():  # use the bounded form for the value, as in backward
                moved = moved + (change(dX.detach(), options, factor) - moved).detach()
            return moved.to(X.dtype), None, None, None


def _refuse_singular(X: Tensor, eigvals: Tensor) -> None:
    few = X.shape[-1] <= X.shape[-2]  # centred features have at most n − 1 directions
    if not few and not checks_values(X):
        return
    singular = torch.full(X.shape[:-2], few, device=X.device) | (eigvals == 0).any(-1)
    if few or singular.any():
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(X.shape)} has a covariance that is singular up to rounding"
            f"{'' if few else bad_indices(singular)}{place()}; give eps > 0, or rank='pinv'"
        )
