"""The whitening matrix of a covariance, by ZCA, PCA or Cholesky."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import (
    bad_indices,
    hermitian,
    hermitian_part,
    readable,
    refuse_in_onnx,
    require_matrix,
    require_nonnegative,
)
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.products import identity, positive_or_one

from .._rank import Rank, eigenpairs, matrix_tolerance, require_rank_policy
from .._roots import invsqrtm
from ..derivatives import reciprocal_or_zero
from ..solvers import Eigh, Solver, choose_solver

WhiteningMethod = Literal["zca", "pca", "cholesky"]


def whitening_matrix(
    P: Tensor,
    *,
    eps: float = 0.0,
    method: WhiteningMethod = "zca",
    relative: bool = False,
    rank: Rank = "ridge",
    solver: str | Solver = "auto",
) -> Tensor:
    """The whitening matrix W of a covariance, W (P + εI) Wᴴ = I: what :func:`whiten` applies to features.

    Args:
        P: (..., d, d) Hermitian positive (semi)definite; any floating or complex dtype, half precision is computed
            in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        method: ``"zca"``, ``"pca"`` or ``"cholesky"``.
        relative: whether ε is in units of the mean eigenvalue tr P/d.
        rank: as in :func:`invsqrtm`; for ZCA only.
        solver: for the inverse root of ZCA and PCA, as in :func:`sqrtm`.

    Returns:
        (..., d, d) in the dtype of P: (P + εI)^{-1/2} for ``"zca"``; for ``"pca"`` the eigenvectors as rows, by
        descending eigenvalue, divided by the square roots of their eigenvalues; lower triangular for ``"cholesky"``.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite (checked on the CPU by default); an unknown
            method, solver or policy, or a combination that is not possible.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d³) per matrix. ZCA and Cholesky differentiate to every order at any spectrum; PCA once, and only
    where the eigenvalues are simple (tied pairs contribute 0). Source: Kessy, Lewin and Strimmer, The American
    Statistician, 2018.

    Example:
        >>> import torch
        >>> whitening_matrix(torch.diag(torch.tensor([4.0, 16.0])), method="pca")
        tensor([[0.0000, 0.2500],
                [0.5000, 0.0000]])
    """
    require_options(method, eps, rank, solver)
    require_matrix(P, "P", square=True)
    if P.shape[-1] == 0:
        return P.clone()
    with full_precision(P):
        work = P.to(working_dtype(P.dtype))
        if not relative:
            return matrix_of(work, method, eps, rank, solver).to(P.dtype)
        scale = work.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
        scale = positive_or_one(scale)
        return (matrix_of(work / scale, method, eps, rank, solver) / scale.sqrt()).to(P.dtype)


def require_options(method: str, eps: float, rank: str, solver: str | Solver) -> None:
    """Raise for an unknown method, and for options that the method would ignore."""
    require_known(method, get_args(WhiteningMethod), "whitening method")
    require_nonnegative(eps, "eps")
    require_rank_policy(rank, eps)
    if method == "cholesky":
        refuse_in_onnx("Cholesky decomposition")
    if method != "zca" and rank != "ridge":
        raise ValueError(f"rank={rank!r} is for method='zca', not {method!r}")
    if not isinstance(choose_solver(solver), Eigh) and method == "cholesky":
        raise ValueError(f"method='cholesky' takes no solver, got {solver!r}")


def matrix_of(P: Tensor, method: WhiteningMethod, eps: float, rank: Rank, solver: str | Solver) -> Tensor:
    if method != "cholesky":
        S = invsqrtm(P, eps=eps, rank=rank, solver=solver)
        return S if method == "zca" else _principal_axes(hermitian_part(P)).mH @ S
    P = hermitian(P) if readable(P) else hermitian_part(P)
    eye = identity(P)
    L, info = torch.linalg.cholesky_ex(torch.add(P, eye, alpha=eps) if eps else P)
    W = torch.linalg.solve_triangular(L, eye, upper=False)
    if readable(P):
        singular = info != 0
        if eps == 0.0:
            singular |= _singular(P.detach(), W.detach())
        if singular.any():
            raise NotPositiveSemidefiniteError(
                f"P is singular up to rounding in {P.dtype}{bad_indices(singular)}{place()}: it has no Cholesky "
                "factor; give eps > 0, or method='zca' with rank='pinv'"
            )
    return W


def _singular(P: Tensor, W: Tensor) -> Tensor:
    """(...,) whether the smallest eigenvalue of P is a rounding error, given P^{-1} = Wᴴ W.

    It is at least 1/tr P^{-1}; the eigenvalues are computed only if this bound does not settle the question.
    """
    bound = P.shape[-1] * torch.finfo(P.dtype).eps * P.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    if (bound * W.abs().square().sum((-2, -1)) < 1.0).all():
        return torch.zeros_like(bound, dtype=torch.bool)
    eigvals = torch.linalg.eigvalsh(P)
    return eigvals[..., 0] <= matrix_tolerance(eigvals).squeeze(-1)


def _principal_axes(P: Tensor) -> Tensor:
    """Eigenvectors as columns by descending eigenvalue, each with a positive largest entry.

    Their first derivative is dU = U (F ∘ (Uᴴ dP U)) with F_ij = 1/(λj − λi), and 0 for pairs tied up to rounding.
    """
    eigvals, U = eigenpairs(P)
    eigvals, U = eigvals.flip(-1), U.flip(-1)
    gap = eigvals.unsqueeze(-2) - eigvals.unsqueeze(-1)
    F = reciprocal_or_zero(torch.where(gap.abs() > matrix_tolerance(eigvals).unsqueeze(-1), gap, 0.0))
    inside = U.mH @ P @ U
    axes = U + U @ (F * (inside - inside.detach()))
    # The phase depends on P too.
    top = axes.gather(-2, U.abs().argmax(-2, keepdim=True))
    return axes * (top.conj() / top.abs())
