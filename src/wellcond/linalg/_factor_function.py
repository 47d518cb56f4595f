"""The factor form: a function of a covariance from its features, differentiated through them and not through P.

With the thin SVD A = U Σ Vᴴ of the factor A = (X − mean)/√n the covariance P = A Aᴴ vanishes outside the range of U, so
f(P + εI) is f(ε) I + U (f(Σ² + ε) − f(ε)) Uᴴ. Its derivative along P is L = Ũ (f[λi, λj] ∘ ŨᴴGŨ) Ũᴴ over a full basis
Ũ (Daleckii and Krein 1965), and the gradient in A is 2 L A, of which only the columns in the range of A are needed:

    ∂l/∂A = 2 [U ((K − 1 kᵀ) ∘ UᴴGU) + G U diag(k)] Σ Vᴴ,   K_ij = f[σi² + ε, σj² + ε],  k_j = f[σj² + ε, ε].

For the square root every coefficient K_ij σj = σj/(σi + σj) lies in [0, 1]: its first derivative is bounded by
√2 ‖G‖ at any condition number (Araki and Yamagami 1981). Going through P in the dtype of A loses that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import bad_indices, checks_values, hermitian_part, require_finite
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import full_precision, widened
from wellcond._shared.products import product

from ._covariance import centred_factor, times_centred
from ._factor import Factor, factorise
from ._rank import eigenpairs
from .derivatives import (
    Power,
    SpectralMap,
    Truncated,
    apply_function,
    derivative_along,
    in_eigenbasis,
    reciprocal_or_zero,
    root_exponent,
)


class Options(NamedTuple):
    """What is computed: f(P + εI) of the covariance with this divisor correction."""

    f: SpectralMap
    eps: float
    correction: int
    singular_is_error: bool


class FactorFunction(BatchedFunction):
    """f(A Aᴴ + εI) with the factor A of features X of the working dtype, differentiated in X."""

    @staticmethod
    def forward(X: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if checks_values(X) and not math.isfinite(abs(X.sum().item())):
            require_finite(X, "X")
        f, eps = options.f, options.eps
        eigvals, U, V = factorise(X, options.correction)
        if options.singular_is_error:
            _refuse_singular(X, eigvals)
        if _is_bounded(f) and V.numel():  # no product amplifies what rounding leaves: the working dtype will do
            U, V = U.to(X.dtype), V.to(X.dtype)
        if _is_basis(U) or _vanishes_at_zero(options):
            values = f.values(eigvals + eps if eps else eigvals).to(U.real.dtype)
            return product(U * values.unsqueeze(-2), U.mH).to(X.dtype), eigvals, U, V
        values = f.values(_with_null(eigvals) + eps)
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
            exact = _gradient(X, G, ctx.options, Factor(*factor))
            if differentiated_again():
                # The same as a differentiable expression of X and G, which keeps the one above as its value.
                again = _differentiable_gradient(X, G, ctx.options, Factor(*factor))
                exact = again + (exact - again).detach()
            return exact, None

    @staticmethod
    def jvp(ctx: Any, dX: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        X, *saved = ctx.saved_tensors
        options, factor = ctx.options, Factor(*saved)
        with full_precision(X):
            A, dA = (centred_factor(widened(x), options.correction) for x in (X, dX))
            if (inner := _inner_power(A, options, factor)) is not None:
                S, along = inner
                half = dA @ S @ A.mH
                moved = half + half.mH + A @ along(dA.mH @ A + A.mH @ dA) @ A.mH
            else:
                half = dA @ A.mH
                moved = _along(A, half + half.mH, options, factor)
            if factor.V.numel():  # the bounded form for the value, as in backward
                moved = moved + (_change(dX.detach(), options, factor) - moved).detach()
            return moved.to(X.dtype), None, None, None


def _is_basis(U: Tensor) -> bool:
    return U.shape[-2] == U.shape[-1]


def _is_bounded(f: SpectralMap) -> bool:
    """Whether all coefficients of the gradient lie in [0, 1]."""
    return root_exponent(f) == 0.5


def _vanishes_at_zero(options: Options) -> bool:
    """Whether f(ε) = 0, so that nothing is added outside the range."""
    f, eps, _, _ = options
    return eps == 0.0 and (isinstance(f, Truncated) or (isinstance(f, Power) and f.exponent > 0.0))


def _with_null(eigvals: Tensor) -> Tensor:
    """The spectrum with one more eigenvalue 0, which stands for all directions outside the range."""
    return torch.nn.functional.pad(eigvals, (0, 1))


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


def _gradient(X: Tensor, G: Tensor, options: Options, factor: Factor) -> Tensor:
    """∂l/∂X. The rows of V sum to zero like those of A, and so do those of the gradient: it is centred already."""
    f, eps, correction, _ = options
    eigvals, U, V = factor
    divisor = X.shape[-1] - correction
    G = G.to(U.dtype)
    if not V.numel():
        # K grows like 1/σ² at most, and A shrinks as much: in float64 the product keeps eps64 σ_max/σ_min of its
        # digits, beyond the rounding of single precision for every σ that the Gram matrix resolves.
        return times_centred(in_eigenbasis(U, f.differences(eigvals + eps).mul_(2 / divisor), G), X)
    C, c = _coefficients(options, factor, divisor)
    GU = product(G, U)
    half = product(U, product(U.mH, GU).mul_(C))
    if c is not None:
        half.add_(GU * c)
    return product(half, V.mH).to(X.dtype)


def _change(dX: Tensor, options: Options, factor: Factor) -> Tensor:
    """The change of f along dX: the adjoint of :func:`_gradient`, with the same coefficients."""
    _, U, V = factor
    C, c = _coefficients(options, factor, dX.shape[-1] - options.correction)
    dXV = (dX.to(U.dtype) - dX.to(U.dtype).mean(-1, keepdim=True)) @ V
    half = U @ (C * (U.mH @ dXV)) @ U.mH
    if c is not None:
        half = half + (dXV * c) @ U.mH
    return hermitian_part(half)


def _coefficients(options: Options, factor: Factor, divisor: int) -> tuple[Tensor, Tensor | None]:
    """2 (K − 1 kᵀ) σ/√(n − correction) and 2 kᵀ σ/√(n − correction), which is not needed over a full basis."""
    f, eps, _, _ = options
    eigvals, U, _ = factor
    right = (eigvals * (4 / divisor)).sqrt_().unsqueeze(-2)
    if _is_basis(U):
        return f.differences(eigvals + eps).mul_(right).to(U.dtype), None
    if _vanishes_at_zero(options):
        c = (f.values(eigvals) * reciprocal_or_zero(eigvals)).unsqueeze(-2) * right
        C = f.differences(eigvals).mul_(right).sub_(c)
    else:
        K = f.differences(_with_null(eigvals) + eps)
        c = K[..., -1:, :-1] * right
        C = K[..., :-1, :-1] * right - c
    return C.to(U.dtype), c.to(U.dtype)


def _differentiable_gradient(X: Tensor, G: Tensor, options: Options, factor: Factor) -> Tensor:
    A, G = centred_factor(widened(X), options.correction), widened(G)
    if (inner := _inner_power(A, options, factor)) is not None:
        S, along = inner
        gradient = 2 * (G @ A @ S + A @ along(A.mH @ G @ A))
    else:
        gradient = 2 * _along(A, G, options, factor) @ A
    return ((gradient - gradient.mean(-1, keepdim=True)) / (X.shape[-1] - options.correction) ** 0.5).to(X.dtype)


def _inner_power(A: Tensor, options: Options, factor: Factor) -> Any:
    """S = M^{p−1} on the range of M = Aᴴ A and its derivative, where (A Aᴴ)^p = A S Aᴴ is the better way.

    That is where P has null directions for want of samples (of which centring takes one), and without ε: smooth in A
    where they turn.
    """
    f, eps, _, _ = options
    inner = f.f if isinstance(f, Truncated) else f
    if A.shape[-1] > A.shape[-2] or eps > 0.0 or not isinstance(inner, Power) or inner.exponent == 0.0:
        return None
    M, g = A.mH @ A, Truncated(Power(inner.exponent - 1.0), "pinv", fixed_range=True)
    eigvals, U, V = factor
    if not V.numel():
        V = A.detach().mH @ (U * reciprocal_or_zero(eigvals.sqrt()).unsqueeze(-2))
    pairs = eigvals, widened(V)
    return apply_function(M, g, *pairs), lambda E: derivative_along(M, E, g, *pairs)


def _along(A: Tensor, E: Tensor, options: Options, factor: Factor) -> Tensor:
    """The derivative of f at P + εI along Hermitian E, differentiable in A and E."""
    P = A @ A.mH
    eigvals, basis = factor.eigvals, widened(factor.U)
    if not _is_basis(basis):
        found, basis = eigenpairs(P)
        # As many as the features have; the others, first in ascending order, are those outside the range.
        known = eigvals.sort(-1).values
        eigvals = torch.cat([torch.zeros_like(found[..., known.shape[-1] :]), known], -1)
    return derivative_along(P, E, options.f, eigvals + options.eps, basis)
