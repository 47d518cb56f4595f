"""Functions of a Hermitian matrix from its eigenpairs, with exact derivatives.

F = U f(Λ) Uᴴ. Its derivative along E is U (f[λi, λj] ∘ Uᴴ E U) Uᴴ (Daleckii and Krein 1965; Higham 2008, ch. 3), and
its second derivative along E and F is Σ_k f[λi, λk, λj] (Ê_ik F̂_kj + F̂_ik Ê_kj) in the eigenbasis. Nothing divides by
a difference of eigenvalues. The square root and its inverse have derivatives of every order, by the Sylvester equation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.checks import hermitian_part
from wellcond._shared.precision import full_precision

from .._rank import without_noise
from ._divided_differences import Power, SpectralMap, reciprocal_or_zero
from ._sylvester import in_eigenbasis, sylvester
from ._truncated import RootAtZero, Truncated


def apply_function(P: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
    """f(P) from the eigenpairs of P; twice differentiable in P."""
    return _Function.call(P, f, eigvals, U)


def derivative_along(P: Tensor, E: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
    """The derivative of f at P along E, which is self-adjoint; differentiable in P and E.

    Once more for most functions, to every order for the two roots.
    """
    E = hermitian_part(E)
    exponent = root_exponent(f)
    if exponent is None:
        return _Derivative.call(P, E, f, eigvals, U)
    root = apply_function(P, f, eigvals, U)
    s = (without_noise(eigvals) if isinstance(f, RootAtZero) else eigvals).sqrt()
    if exponent > 0:
        return sylvester(root, E, s, U)
    # From S P S = I: dS = −S Y S with SY + YS = S dP S.
    return -root @ sylvester(root, root @ E @ root, reciprocal_or_zero(s), U) @ root


def root_exponent(f: SpectralMap) -> float | None:
    """1/2 or −1/2 if the derivative of f is that of this root, with zero for null directions; else None."""
    if isinstance(f, Truncated) and not f.floor:
        # A rotating range adds terms across the cut, and between null directions in the second derivative.
        f = f.f if f.fixed_range else f
    if isinstance(f, RootAtZero):
        f = f.f
    return f.exponent if isinstance(f, Power) and abs(f.exponent) == 0.5 else None


def _second_derivative(E: Tensor, F: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
    return _SecondDerivative.call(hermitian_part(E), hermitian_part(F), f, eigvals, U)


class _Function(BatchedFunction):
    """f(P)."""

    @staticmethod
    def forward(P: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
        return (U * f.values(eigvals).unsqueeze(-2)) @ U.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        P, ctx.f, eigvals, U = inputs
        ctx.save_for_backward(P, eigvals, U)
        ctx.save_for_forward(P, eigvals, U)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, eigvals, U = ctx.saved_tensors
        with full_precision(P):
            return derivative_along(P, grad, ctx.f, eigvals, U), None, None, None

    @staticmethod
    def jvp(ctx: Any, dP: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, eigvals, U = ctx.saved_tensors
        with full_precision(P):
            return derivative_along(P, dP, ctx.f, eigvals, U)


class _Derivative(BatchedFunction):
    """The derivative of f at P along Hermitian E, which is self-adjoint."""

    @staticmethod
    def forward(P: Tensor, E: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
        return in_eigenbasis(U, f.differences(eigvals), E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        P, E, ctx.f, eigvals, U = inputs
        ctx.save_for_backward(P, E, eigvals, U)
        ctx.save_for_forward(P, E, eigvals, U)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, E, eigvals, U = ctx.saved_tensors
        with full_precision(P):
            grad_P = _second_derivative(E, grad, ctx.f, eigvals, U) if ctx.needs_input_grad[0] else None
            return grad_P, derivative_along(P, grad, ctx.f, eigvals, U), None, None, None

    @staticmethod
    def jvp(ctx: Any, dP: Tensor | None, dE: Tensor | None, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, E, eigvals, U = ctx.saved_tensors
        with full_precision(P):
            change = torch.zeros_like(E) if dE is None else derivative_along(P, dE, ctx.f, eigvals, U)
            return change if dP is None else change + _second_derivative(E, dP, ctx.f, eigvals, U)


class _SecondDerivative(BatchedFunction):
    """The second derivative of f along Hermitian E and F; O(d³) memory per matrix."""

    @staticmethod
    def forward(E: Tensor, F: Tensor, f: SpectralMap, eigvals: Tensor, U: Tensor) -> Tensor:
        differences = f.second_differences(eigvals).to(U.dtype)
        E, F = U.mH @ E @ U, U.mH @ F @ U
        half = torch.einsum("...ikj,...ik,...kj->...ij", differences, E, F)
        return U @ (half + half.mH) @ U.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("third derivatives of powm, logm and expm are not implemented; those of sqrtm are")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("third derivatives of powm, logm and expm are not implemented; those of sqrtm are")
