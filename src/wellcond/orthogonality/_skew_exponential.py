"""exp(A) − I for matrices A similar to skew-symmetric ones, in few products, without making the host wait.

The [3/3] Padé approximant r of the exponential at A/σ, σ = 2^s, followed by a fixed number s of squarings (Higham,
Functions of Matrices, 2008, ch. 10). What is squared is D = r − I, by (I + D)² − I = 2D + D²: one product, without
cancellation since D is small where A is. |r| = 1 on the imaginary axis, so exp(A) is orthogonal for skew-symmetric A of
any size; its angles θ have the relative error (θ/σ)⁶/100800, below rounding up to θ = 250 (float64: 1,000).

The derivative is written out, as autograd's takes three times as many operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again
from wellcond._shared.precision import full_precision
from wellcond._shared.products import plus_product
from wellcond._shared.torch_internals import is_compiling, under_forward_mode, under_functorch
from wellcond.linalg.lapack import solve


def squarings(dtype: torch.dtype) -> int:
    """s, such that angles up to 250 in float32, and 1,000 in float64, are exact to rounding."""
    return 16 if dtype == torch.float64 else 9


def exponential_less_identity(A: Tensor) -> Tensor:
    """exp(A) − I for A (batch, d, d) similar to a skew-symmetric matrix; differentiable in all modes.

    Complexity: 11 products and one LU solve in float32; 24 and one for its derivative.
    """
    if is_compiling() or under_functorch() or under_forward_mode():
        _, T, B = _pade(A)
        return _levels(T, B)[-1]
    return _Exponential.apply(A)  # pyright: ignore[reportReturnType]


def _levels(T: Tensor, B: Tensor) -> list[Tensor]:
    """D after 0, 1, …, s squarings."""
    levels = [solve(B, T)]
    for _ in range(squarings(T.dtype)):
        D = levels[-1]
        levels.append(plus_product(D, D, D, beta=2))
    return levels


def _pade(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A², T and B with r(A/σ) − I = B⁻¹T: T = 10σ A + A³/(6σ), B = 10σ² I + A² − T/2.

    B is regular for eigenvalues on the imaginary axis, so no check is needed.
    """
    unit = 2.0 ** squarings(A.dtype)
    A2 = A @ A
    T = plus_product(A, A, A2, beta=10 * unit, alpha=1 / (6 * unit))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return A2, T, torch.add(torch.sub(A2, T, alpha=0.5), eye, alpha=10 * unit**2)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        A2, T, B = _pade(A)
        *below, D = _levels(T, B)
        ctx.save_for_backward(A, A2, B, *below)
        return D

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, A2, B, *below = ctx.saved_tensors
        with full_precision(A):
            if differentiated_again():  # the saved tensors have no graph
                A2, T, B = _pade(A)
                below = _levels(T, B)[:-1]
            return _adjoint(A, A2, B, below, grad)


def _adjoint(A: Tensor, A2: Tensor, B: Tensor, below: list[Tensor], G: Tensor) -> Tensor:
    """The adjoint of the derivative at A, applied to G, from all levels but the last."""
    for D in reversed(below):
        G = plus_product(plus_product(G, D.mT, G, beta=2), G, D.mT)
    unit = 2.0 ** squarings(A.dtype)
    H = solve(B.mT, G)
    minus_of_B = H @ below[0].mT
    of_T = torch.add(H, minus_of_B, alpha=0.5)
    of_A2 = plus_product(minus_of_B, A.mT, of_T, beta=-1, alpha=1 / (6 * unit))
    of_A = plus_product(of_T, of_T, A2.mT, beta=10 * unit, alpha=1 / (6 * unit))
    return plus_product(plus_product(of_A, of_A2, A.mT), A.mT, of_A2)
