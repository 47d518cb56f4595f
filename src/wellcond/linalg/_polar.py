"""The polar factor U Vᴴ of A = U Σ Vᴴ: the nearest (semi-)orthogonal matrix, eq. (14)–(17).

Its derivative truly contains 1/(σi + σj) (and 1/σj out of the range): it is a whitening. Directions in which A vanishes
get the value and the derivative 0 there, so the factor of a zero matrix is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import checks_values, full_precision, require_finite, require_matrix, working_dtype
from ._svd import thin_svd
from ._sylvester import differentiated_again, reciprocal_or_zero, sylvester
from ._vmap import BatchedFunction


def polar(G: Tensor, *, solver: str = "auto") -> Tensor:
    """The nearest matrix to G with orthonormal columns (or rows, if G is wide), in the Frobenius norm.

    Args:
        G: (..., m, n); any floating or complex dtype, half precision is computed in float32. Each matrix is scaled
            by its largest entry first, so ``polar(c * G) == polar(G)`` for any c > 0 that the dtype can hold.
        solver: ``"auto"`` or ``"svd"``, the thin singular value decomposition.

    Returns:
        (..., m, n) in the dtype of G: U Vᴴ over the singular values above eps · max(m, n) of the largest. A
        rank-deficient G therefore gives a partial isometry, and a zero G gives zero.

    Raises:
        TypeError: G is not a floating or complex tensor.
        ValueError: fewer than two dimensions; NaN or infinite entries (checked on the CPU by default); unknown solver.
        DecompositionError: no singular value decomposition converged.

    Complexity: one thin SVD, O(m n min(m, n)) per matrix. Derivatives of every order exist at full rank.
    Source: Higham, Functions of Matrices, 2008, ch. 8; eq. (14)–(17) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    require_matrix(G, "G")
    if solver not in ("auto", "svd"):
        raise ValueError(f"unknown solver '{solver}' for polar (known: auto, svd)")
    with full_precision(G):
        A = G.to(working_dtype(G.dtype))
        tall = A.shape[-2] >= A.shape[-1]
        W, *_ = Polar.call(A if tall else A.mH)
        return (W if tall else W.mH.resolve_conj()).to(G.dtype)


class Polar(BatchedFunction):
    """W = U Vᴴ of a tall A, differentiated in A."""

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if checks_values(A):
            require_finite(A, "G")
        if A.numel() == 0:
            return (
                A.clone(),
                A.real.new_zeros(*A.shape[:-2], A.shape[-1]),
                A.new_zeros(*A.shape[:-2], *A.shape[-1:] * 2),
            )
        scale = A.abs().amax((-2, -1), keepdim=True)
        scale = torch.where(scale > 0, scale, 1.0)
        U, sigma, Vh = thin_svd(A / scale)
        cut = torch.finfo(A.dtype).eps * A.shape[-2]
        kept = sigma > cut * sigma.amax(-1, keepdim=True)
        sigma = torch.where(kept, sigma * scale.squeeze(-1), 0.0)
        return (U * kept.unsqueeze(-2)) @ Vh, sigma, Vh.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None
        A, W, sigma, V = ctx.saved_tensors
        with full_precision(A):
            H, inverse = _hermitian_factor(A, W, sigma, V)
            inside = W.mH @ grad
            return W @ sylvester(H, inside - inside.mH, sigma, V) + (grad - W @ inside) @ inverse

    @staticmethod
    def jvp(ctx: Any, dA: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, W, sigma, V = ctx.saved_tensors
        with full_precision(A):
            H, inverse = _hermitian_factor(A, W, sigma, V)
            inside = W.mH @ dA
            return W @ sylvester(H, inside - inside.mH, sigma, V) + (dA - W @ inside) @ inverse, None, None


def _hermitian_factor(A: Tensor, W: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """H = (Aᴴ A)^{1/2} of A = W H as a function of A and W, and its inverse (H X + X H = 2 I)."""
    H = W.mH @ A
    H = (H + H.mH) / 2
    if not differentiated_again():
        return H, (V * reciprocal_or_zero(sigma).unsqueeze(-2)) @ V.mH
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    return H, sylvester(H, 2 * eye, sigma, V)
