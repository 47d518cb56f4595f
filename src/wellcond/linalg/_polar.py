"""The polar factor U Vᴴ of A = U Σ Vᴴ: the nearest (semi-)orthogonal matrix, eq. (14)–(17).

Its derivative contains 1/(σi + σj) (and 1/σj outside the range), as that of any whitening does. Value and derivative
are 0 in directions in which A vanishes, so the factor of a zero matrix is zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction, differentiated_again
from wellcond._shared.checks import checks_values, hermitian_part, require_finite, require_matrix
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.products import identity, plus_product, positive_or_one, product
from wellcond._shared.torch_internals import along_many_directions

from ._polar_by_products import polar_by_products
from ._rank import apart
from .derivatives import reciprocal_or_zero, reciprocal_or_zero_, sylvester
from .lapack import thin_svd
from .solvers import Minimax, largest_entry

POLAR_SOLVERS = ("auto", "svd", "minimax", "muon")


def polar(G: Tensor, *, solver: str | Minimax = "auto") -> Tensor:
    """The nearest matrix to G with orthonormal columns (or rows, if G is wide), in the Frobenius norm.

    Args:
        G: (..., m, n); any floating or complex dtype, half precision is computed in float32. Each matrix is scaled
            by its largest entry first, so ``polar(c * G) == polar(G)`` for any c > 0 that the dtype can hold.
        solver: ``"auto"`` or ``"svd"``, the thin singular value decomposition; ``"minimax"``, matrix products only,
            for singular values down to 1e-5 of the largest (smaller ones end between 0 and 1), or
            ``Minimax(kappa=k)`` for those down to k^{-1/2}; ``"muon"``, the five products-only steps of that
            optimizer, which leave singular values between 0.68 and 1.14.

    Returns:
        (..., m, n) in the dtype of G: U Vᴴ over the singular values above eps · max(m, n) of the largest. A
        rank-deficient G therefore gives a partial isometry, and a zero G gives zero. ``"minimax"`` is within
        10 eps κ(G) of it, as ``"svd"`` is, but has no cut-off.

    Raises:
        TypeError: G is not a floating or complex tensor.
        ValueError: fewer than two dimensions; NaN or infinite entries (checked on the CPU by default); unknown solver.
        DecompositionError: no singular value decomposition converged.

    Complexity: one thin SVD, O(m n min(m, n)) per matrix; two products of m × n by n × n and one of n × n (n ≤ m) in
    each of the 12 steps of ``"minimax"`` (13 in double precision), which ``torch.compile(fullgraph=True)`` captures
    whole. With ``"svd"``, derivatives of every order exist at full rank; the others have none, and raise.
    Source: Higham, Functions of Matrices, 2008, ch. 8; eq. (14)–(17) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    require_matrix(G, "G")
    if not isinstance(solver, Minimax) and solver not in POLAR_SOLVERS:
        raise ValueError(
            f"unknown solver {solver!r} for polar (known: {', '.join(POLAR_SOLVERS)}, or a Minimax object); "
            "the other solvers compute roots of Hermitian matrices"
        )
    with full_precision(G):
        A = G.to(working_dtype(G.dtype))
        tall = A.shape[-2] >= A.shape[-1]
        A = A if tall else A.mH
        if solver in ("auto", "svd"):
            # The usual rank tolerance for singular values.
            cut = torch.finfo(A.dtype).eps * A.shape[-2]
            W, *_ = Polar.call(A, cut, None, "G")
        else:
            W = polar_by_products(A, solver)
        return (W if tall else W.mH.resolve_conj()).to(G.dtype)


class Polar(BatchedFunction):
    """W = U Vᴴ of a tall A, its singular values and V; differentiable in A.

    Singular values up to ``cut`` of the largest, or up to the absolute ``floor`` (..., 1), count as zero. Messages call
    the argument ``name``.
    """

    @staticmethod
    def forward(A: Tensor, cut: float, floor: Tensor | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if A.numel() == 0:
            return (
                A.clone(),
                A.real.new_zeros(*A.shape[:-2], A.shape[-1]),
                A.new_zeros(*A.shape[:-2], *A.shape[-1:] * 2),
            )
        largest = largest_entry(A)
        if checks_values(A) and not math.isfinite(largest.sum().item()):
            require_finite(A, name)
        scale = positive_or_one(largest)
        U, sigma, Vh = thin_svd(A / scale)
        if floor is None and checks_values(sigma) and apart(sigma, -1, 0, cut):  # the usual case
            return product(U, Vh), sigma * scale.squeeze(-1), Vh.mH
        kept = sigma > cut * sigma[..., :1]
        sigma = sigma * scale.squeeze(-1)
        if floor is not None:
            kept = kept & (sigma > floor)
        sigma = sigma.masked_fill(~kept, 0.0)
        return product(U * kept.unsqueeze(-2), Vh), sigma, Vh.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if grad is None else _derivative(grad, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _derivative(dA, *ctx.saved_tensors), None, None


def _derivative(E: Tensor, A: Tensor, W: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    """The derivative of W along E, which is self-adjoint; differentiable in E, A and W."""
    with full_precision(A):
        if not differentiated_again() and not along_many_directions(E):
            return _value_of_derivative(E, W, sigma, V)
        eye = identity(V).expand_as(V)
        H = hermitian_part(product(W.mH, A))  # (Aᴴ A)^{1/2} of A = W H as a function of A and W
        inverse = sylvester(H, 2 * eye, sigma, V)  # H X + X H = 2 I
        inside = W.mH @ E
        return W @ sylvester(H, inside - inside.mH, sigma, V) + (E - W @ inside) @ inverse


def _value_of_derivative(E: Tensor, W: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    """The same derivative, not differentiable again, in the basis of the singular vectors.

    With M = Uᴴ E V and U = W V it is [U (K ∘ (M − Mᴴ) − M Σ⁻¹) + E V Σ⁻¹] Vᴴ, K_ij = 1/(σi + σj).
    """
    EV = product(E, V)
    M = product(V.mH, product(W.mH, EV))
    inverse = reciprocal_or_zero(sigma).unsqueeze(-2)
    K = reciprocal_or_zero_(sigma.unsqueeze(-1) + sigma.unsqueeze(-2))
    inside = (M - M.mH).mul_(K).addcmul_(M, inverse.to(M.dtype), value=-1.0)
    return product(plus_product(EV.mul_(inverse), W, product(V, inside)), V.mH)
