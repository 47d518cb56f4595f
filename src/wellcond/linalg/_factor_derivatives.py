"""The factor form: a function of a covariance from its features, and its derivatives without going through P.

f(P + εI) = f(ε) I + U (f(Σ² + ε) − f(ε)) Uᴴ. Its derivative along P is L = Ũ (f[λi, λj] ∘ ŨᴴGŨ) Ũᴴ over a full basis
Ũ (Daleckii and Krein 1965), and the gradient in A is 2 L A, which needs only the columns in the range of A:

    ∂l/∂A = 2 [U ((K − 1 kᵀ) ∘ UᴴGU) + G U diag(k)] Σ Vᴴ,   K_ij = f[σi² + ε, σj² + ε],  k_j = f[σj² + ε, ε].

For the square root all coefficients K_ij σj = σj/(σi + σj) lie in [0, 1], so the gradient is bounded by √2 ‖G‖ at any
condition number (Araki and Yamagami 1981). Going through P in the dtype of A loses this bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond._shared.checks import hermitian_part
from wellcond._shared.precision import widened
from wellcond._shared.products import product

from ._covariance import centred_factor, times_centred
from ._factor import Factor
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
    """What to compute: f(P + εI) of the covariance with this correction of the divisor."""

    f: SpectralMap
    eps: float
    correction: int
    singular_is_error: bool


def is_basis(U: Tensor) -> bool:
    return U.shape[-2] == U.shape[-1]


def is_bounded(f: SpectralMap) -> bool:
    """Whether all coefficients of the gradient lie in [0, 1], as for the square root."""
    return root_exponent(f) == 0.5


def vanishes_at_zero(options: Options) -> bool:
    """Whether f(ε) = 0, so that f(P + εI) vanishes outside the range."""
    f, eps, _, _ = options
    return eps == 0.0 and (isinstance(f, Truncated) or (isinstance(f, Power) and f.exponent > 0.0))


def with_null(eigvals: Tensor) -> Tensor:
    """The spectrum with an additional eigenvalue 0 that stands for all directions outside the range."""
    return torch.nn.functional.pad(eigvals, (0, 1))


def gradient(X: Tensor, G: Tensor, options: Options, factor: Factor) -> Tensor:
    """∂l/∂X. The rows of V sum to zero like those of A, so the gradient is centred already."""
    f, eps, correction, _ = options
    eigvals, U, V = factor
    divisor = X.shape[-1] - correction
    G = G.to(U.dtype)
    if not V.numel():
        # K grows at most like 1/σ², and A shrinks as σ: in float64 the product keeps eps64 σ_max/σ_min of its digits,
        # which exceeds single precision for every σ that the Gram matrix resolves.
        return times_centred(in_eigenbasis(U, f.differences(eigvals + eps).mul_(2 / divisor), G), X)
    C, c = _coefficients(options, factor, divisor)
    GU = product(G, U)
    half = product(U, product(U.mH, GU).mul_(C))
    if c is not None:
        half.add_(GU * c)
    return product(half, V.mH).to(X.dtype)


def change(dX: Tensor, options: Options, factor: Factor) -> Tensor:
    """The derivative of f along dX, the adjoint of :func:`gradient`, with the same coefficients."""
    _, U, V = factor
    C, c = _coefficients(options, factor, dX.shape[-1] - options.correction)
    dXV = (dX.to(U.dtype) - dX.to(U.dtype).mean(-1, keepdim=True)) @ V
    half = U @ (C * (U.mH @ dXV)) @ U.mH
    if c is not None:
        half = half + (dXV * c) @ U.mH
    return hermitian_part(half)


def _coefficients(options: Options, factor: Factor, divisor: int) -> tuple[Tensor, Tensor | None]:
    """2 (K − 1 kᵀ) σ/√(n − correction) and 2 kᵀ σ/√(n − correction); the latter is None for a full basis."""
    f, eps, _, _ = options
    eigvals, U, _ = factor
    right = (eigvals * (4 / divisor)).sqrt_().unsqueeze(-2)
    if is_basis(U):
        return f.differences(eigvals + eps).mul_(right).to(U.dtype), None
    if vanishes_at_zero(options):
        c = (f.values(eigvals) * reciprocal_or_zero(eigvals)).unsqueeze(-2) * right
        C = f.differences(eigvals).mul_(right).sub_(c)
    else:
        K = f.differences(with_null(eigvals) + eps)
        c = K[..., -1:, :-1] * right
        C = K[..., :-1, :-1] * right - c
    return C.to(U.dtype), c.to(U.dtype)


def differentiable_gradient(X: Tensor, G: Tensor, options: Options, factor: Factor) -> Tensor:
    A, G = centred_factor(widened(X), options.correction), widened(G)
    if (inner := inner_power(A, options, factor)) is not None:
        S, move = inner
        dA = 2 * (G @ A @ S + A @ move(A.mH @ G @ A))
    else:
        dA = 2 * along(A, G, options, factor) @ A
    return ((dA - dA.mean(-1, keepdim=True)) / (X.shape[-1] - options.correction) ** 0.5).to(X.dtype)


def inner_power(A: Tensor, options: Options, factor: Factor) -> Any:
    """S = M^{p−1} on the range of M = Aᴴ A and its derivative, where (A Aᴴ)^p is best computed as A S Aᴴ; else None.

    This is so without ε, where P has null directions because samples are few (centring takes one): the expression is
    smooth in A when those directions turn.
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


def along(A: Tensor, E: Tensor, options: Options, factor: Factor) -> Tensor:
    """The derivative of f at P + εI along Hermitian E, differentiable in A and E."""
    P = A @ A.mH
    eigvals, basis = factor.eigvals, widened(factor.U)
    if not is_basis(basis):
        found, basis = eigenpairs(P)
        # The features determine the largest ones; the remaining, first in ascending order, lie outside the range.
        known = eigvals.sort(-1).values
        eigvals = torch.cat([torch.zeros_like(found[..., known.shape[-1] :]), known], -1)
    return derivative_along(P, E, options.f, eigvals + options.eps, basis)
