"""The factor form: the square root of a covariance straight from the features, differentiated through them.

For Q = (A Aᴴ)^{1/2} and the thin SVD A = U Σ Vᴴ the gradient is 2 [U (H ∘ R) + (I − U Uᴴ) G U] Vᴴ with H = Uᴴ G U
and R_ij = σj/(σi + σj): every coefficient lies in [0, 1], so the gradient is bounded by √2 ‖G‖ at any condition number
(Araki and Yamagami 1981). Going through P = A Aᴴ in the dtype of A loses that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import checks_values, require_finite, require_matrix
from wellcond._shared.precision import full_precision, wide_dtype, working_dtype

from ._covariance import centred_factor, require_samples
from ._roots import sqrtm
from ._sylvester import in_eigenbasis, product, reciprocal_or_zero, sylvester
from ._wide import wide_gram, wide_product
from .lapack import eigh, thin_svd
from .solvers import Solver
from .solvers.eigh import frechet_invsqrt


def covariance_sqrtm(X: Tensor, *, correction: int = 0, solver: str | Solver = "auto") -> Tensor:
    """The square root (X J Xᴴ)^{1/2} of the covariance of features, as global covariance pooling takes it.

    The gradient is bounded by √2 times the incoming one whatever the condition number, also at rank deficiency. The
    work is done on the smaller side of the features: the n × n one for a 7 × 7 map of 256 channels, else the d × d one.

    Args:
        X: (..., d, n) features; any floating or complex dtype, half precision is computed in float32.
        correction: as in :func:`covariance`.
        solver: as in :func:`sqrtm`; any other than ``"auto"`` always goes through P.

    Returns:
        (..., d, d) Hermitian positive semidefinite, in the dtype of X.

    Raises:
        TypeError, ValueError, DecompositionError: as :func:`covariance` and :func:`sqrtm`.

    Complexity: O(d n min(d, n) + d² min(d, n)), in float64. Source: Daleckii–Krein on the factor; the bound is
    that of Araki and Yamagami 1981 for the map A ↦ (A Aᴴ)^{1/2}.

    Example:
        >>> import torch
        >>> covariance_sqrtm(torch.tensor([[3.0, -3.0], [0.0, 0.0], [4.0, -4.0]]))
        tensor([[1.8000, 0.0000, 2.4000],
                [0.0000, 0.0000, 0.0000],
                [2.4000, 0.0000, 3.2000]])
    """
    require_matrix(X, "X")
    require_samples(X, correction)
    with full_precision(X):
        if solver != "auto" or X.shape[-2] == 0:
            A = centred_factor(X, correction=correction)
            return sqrtm(A @ A.mH, solver=solver).to(X.dtype)
        Q, *_ = FactorSqrt.call(X.to(working_dtype(X.dtype)), correction)
        return Q.to(X.dtype)


def _decompose(X: Tensor, correction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q and U, σ, V of A = U Σ Vᴴ, with zero columns in V for directions below the rank tolerance.

    float64 features take the singular value decomposition. For others the eigenpairs of the smaller float64 Gram matrix
    do: it resolves σ down to √eps64 ≈ 1.5e-8 of the largest, beyond the rounding of the features. With n ≥ d, V would
    be another copy of the features; it is left empty, and U and σ stay in float64 (see :func:`_gradient_by_gram`).
    """
    d, n = X.shape[-2:]
    if wide_dtype(X) == X.dtype:
        A = centred_factor(X, correction=correction)
        U, sigma, Vh = thin_svd(A) if n < d else _adjoint(thin_svd(A.mH))
        # The usual rank tolerance on singular values.
        kept = sigma > torch.finfo(X.dtype).eps * max(d, n) * sigma.amax(-1, keepdim=True)
        sigma = torch.where(kept, sigma, 0.0)
        return (U * sigma.unsqueeze(-2)) @ U.mH, U, sigma, Vh.mH * kept.unsqueeze(-2)
    A = centred_factor(X.to(wide_dtype(X)), correction=correction) if n < d else None
    gram = wide_gram(X) / (n - correction) if A is None else A.mH @ A
    eigvals, basis = eigh((gram + gram.mH) / 2)
    # Gram entries are exact to eps64 times their length, so σ² below that of the largest is rounding.
    cut = 10 * max(d, n) * torch.finfo(torch.float64).eps
    sigma = torch.where(eigvals > cut * eigvals.amax(-1, keepdim=True), eigvals.clamp_min(0.0), 0.0).sqrt()
    if A is not None:
        V = basis * (sigma > 0).unsqueeze(-2)
        U = (A @ (V * reciprocal_or_zero(sigma).unsqueeze(-2))).to(X.dtype)
        sigma = sigma.to(X.real.dtype)
        return (U * sigma.unsqueeze(-2)) @ U.mH, U, sigma, V.to(X.dtype)
    Q = product(basis * sigma.unsqueeze(-2), basis.mH).to(X.dtype)
    return Q, basis, sigma, X.new_empty(*X.shape[:-2], 0, 0)


def _adjoint(svd: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, Vh = svd
    return Vh.mH, sigma, U.mH


class FactorSqrt(BatchedFunction):
    """Q = (A Aᴴ)^{1/2} with the factor A of features X, differentiated in X."""

    @staticmethod
    def forward(X: Tensor, correction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if checks_values(X) and not math.isfinite(abs(X.sum().item())):
            require_finite(X, "X")
        return _decompose(X, correction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        X, ctx.correction = inputs
        ctx.save_for_backward(X, *output)
        ctx.save_for_forward(X, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None
        X, Q, U, sigma, V = ctx.saved_tensors
        divisor = X.shape[-1] - ctx.correction
        with full_precision(X):
            G = (grad + grad.mH) / 2
            # The rows of V sum to zero like those of A, and so do those of the gradient: it is centred already.
            bounded = (
                _bounded_gradient(G, U, sigma, V).div_(divisor**0.5)
                if V.numel()
                else _gradient_by_gram(X, G, U, sigma, divisor)
            )
            if not differentiated_again():
                return bounded, None
            # Somebody will differentiate again: the same gradient as a differentiable expression of X and G,
            # which keeps the bounded one as its value.
            A = centred_factor(X, correction=ctx.correction)
            if A.shape[-1] < A.shape[-2]:
                S = _range_invsqrt(A, sigma, V)
                again = 2 * (G @ A @ S + A @ frechet_invsqrt(S, A.mH @ G @ A, sigma, V))
            else:
                again = 2 * sylvester(Q, G, sigma.to(A.real.dtype), U.to(A.dtype)) @ A
            again = (again - again.mean(-1, keepdim=True)) / divisor**0.5
            return again + (bounded - again).detach(), None

    @staticmethod
    def jvp(ctx: Any, dX: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        X, Q, U, sigma, V = ctx.saved_tensors
        with full_precision(X):
            A, dA = (centred_factor(x, correction=ctx.correction) for x in (X, dX))
            if A.shape[-1] < A.shape[-2]:
                S = _range_invsqrt(A, sigma, V)
                half = dA @ S @ A.mH
                dS = frechet_invsqrt(S, dA.mH @ A + A.mH @ dA, sigma, V)
                return half + half.mH + A @ dS @ A.mH, None, None, None
            half = dA @ A.mH
            return sylvester(Q, half + half.mH, sigma.to(A.real.dtype), U.to(A.dtype)), None, None, None


class _RangeInvSqrt(BatchedFunction):
    """M^{-1/2} on the range of M, given s, V with M = V s² Vᴴ; differentiated in M."""

    @staticmethod
    def forward(M: Tensor, s: Tensor, V: Tensor) -> Tensor:
        return (V * reciprocal_or_zero(s).unsqueeze(-2)) @ V.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return frechet_invsqrt(ctx.saved_tensors[0], grad, *ctx.saved_tensors[1:]), None, None

    @staticmethod
    def jvp(ctx: Any, dM: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return frechet_invsqrt(ctx.saved_tensors[0], dM, *ctx.saved_tensors[1:])


def _range_invsqrt(A: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    return _RangeInvSqrt.call(A.mH @ A, sigma, V)


def _bounded_gradient(G: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    GU = G @ U
    total = sigma.unsqueeze(-1) + sigma.unsqueeze(-2)
    # 1 − R_ij = σi/(σi + σj); where both vanish V has no column and the value does not matter.
    kept = sigma.unsqueeze(-1) * reciprocal_or_zero(total)
    return 2 * (GU - U @ ((U.mH @ GU) * kept)) @ V.mH


def _gradient_by_gram(X: Tensor, G: Tensor, U: Tensor, sigma: Tensor, divisor: int) -> Tensor:
    """2 Y A/√divisor with QY + YQ = G, all in float64: the same gradient where V = Aᴴ U Σ^{-1} was not kept.

    Y grows like 1/σ_min, and A shrinks as much: in float64 the product keeps eps64 σ_max/σ_min, below the rounding of
    the features for every σ that the Gram matrix resolves.
    """
    K = reciprocal_or_zero(sigma.unsqueeze(-1) + sigma.unsqueeze(-2)) * (2 / divisor)
    return wide_product(in_eigenbasis(U, K, G.to(U.dtype)), X)
