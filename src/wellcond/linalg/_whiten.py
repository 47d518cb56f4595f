"""Whitening features: a linear map of the centred samples whose covariance is the identity (up to ε).

ZCA takes (P + εI)^{-1/2}, the whitening nearest to the data; PCA the eigenvector coordinates Λ^{-1/2} Uᴴ; Cholesky
the inverse of the triangular factor. They differ by a rotation (Kessy, Lewin and Strimmer, The American Statistician,
2018).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import bad_indices, readable, require_finite, require_matrix, require_nonnegative
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import full_precision

from ._covariance import centred_factor
from ._eigenpairs import eigenpairs
from ._rank_policy import Rank, rank_tolerance, require_rank_policy
from ._roots import invsqrtm
from ._sylvester import reciprocal_or_zero
from ._whiten_factor import cholesky_from_factor, zca_from_factor
from .solvers import Eigh, Solver, choose_solver

WhiteningMethod = Literal["zca", "pca", "cholesky"]
Via = Literal["auto", "factor", "covariance"]


def whiten(
    X: Tensor,
    *,
    eps: float = 0.0,
    method: WhiteningMethod = "zca",
    relative: bool = False,
    rank: Rank = "ridge",
    correction: int = 0,
    solver: str | Solver = "auto",
    via: Via = "auto",
) -> Tensor:
    """Features with zero mean and the identity for covariance: W (X − mean) with W (P + εI) Wᴴ = I.

    Args:
        X: (..., d, n) features, n samples of d channels; any floating or complex dtype, half precision is computed
            in float32.
        eps: ε ≥ 0; singular covariances (n ≤ d among them) need it positive, or another ``rank`` policy.
        method: ``"zca"``, ``"pca"`` (rows in the order of falling eigenvalues, the largest entry of each eigenvector
            positive) or ``"cholesky"`` (lower triangular W).
        relative: take ε in units of the mean eigenvalue tr P/d, so that ``whiten(c * X) == whiten(X)``.
        rank: as in :func:`invsqrtm`; ZCA only.
        correction: as in :func:`covariance`.
        solver: of the inverse root of ZCA, as in :func:`sqrtm`.
        via: ``"covariance"`` forms P = A Aᴴ, of which the dtype resolves κ(P) up to 1/eps; ``"factor"`` decomposes
            the features themselves, which resolves κ(P) up to 1/eps² (ZCA and Cholesky, with ``rank="ridge"`` or
            ``"pinv"``). ``"auto"`` takes the factor for a regularised ZCA of at least twice as many channels as
            samples, where it is faster too, and P elsewhere, where the factor takes 1.3 to 4 times as long.

    Returns:
        (..., d, n) in the dtype of X.

    Raises:
        TypeError, ValueError, DecompositionError: as :func:`covariance` and :func:`invsqrtm`; an unknown method;
            an option that ``via="factor"`` does not take.

    Complexity: two products of d × d by d × n and O(d³); with the factor, O(d n min(d, n)). ZCA and Cholesky
    differentiate to every order at any spectrum; PCA is differentiable only where the eigenvalues are simple (tied
    pairs contribute 0), and once.

    Example:
        >>> import torch
        >>> Y = whiten(torch.randn(3, 100), method="cholesky")
        >>> torch.allclose(torch.cov(Y, correction=0), torch.eye(3), atol=1e-5)
        True
    """
    if method not in get_args(WhiteningMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(WhiteningMethod))}, got {method!r}")
    require_nonnegative(eps, "eps")
    require_rank_policy(rank, eps)
    require_matrix(X, "X")
    if method != "zca" and rank != "ridge":
        raise ValueError(f"rank={rank!r} is for method='zca', not {method!r}")
    if not isinstance(choose_solver(solver), Eigh) and method == "cholesky":
        raise ValueError(f"method='cholesky' takes no solver, got {solver!r}")
    by_factor = _goes_by_factor(X, via, method, eps, rank, solver)
    if X.shape[-2] == 0:
        return X.clone()
    with full_precision(X):
        A = centred_factor(X, correction=correction)
        root_n = (X.shape[-1] - correction) ** 0.5
        if relative:
            # Nothing changes when the features are scaled, so any scale will do that keeps P in the range of the dtype.
            largest = A.detach().abs().amax((-2, -1), keepdim=True)
            A = A / torch.where(largest > 0, largest, 1.0)
            size = A.abs().square().sum((-2, -1), keepdim=True) / A.shape[-2]
            A = A / torch.where(size > 0, size, 1.0).sqrt()
        if by_factor:
            white = cholesky_from_factor(A, eps) if method == "cholesky" else zca_from_factor(A, eps, rank)
            return (white * root_n).to(X.dtype)
        P = A @ A.mH
        if method == "zca":
            white = invsqrtm(P, eps=eps, rank=rank, solver=solver) @ A
        elif method == "cholesky":
            eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
            L, info = torch.linalg.cholesky_ex(P + eps * eye)
            _require_definite(P, info)
            white = torch.linalg.solve_triangular(L, A, upper=False)
        else:
            white = _principal_axes(P).mH @ (invsqrtm(P, eps=eps, solver=solver) @ A)
        return (white * root_n).to(X.dtype)


def _goes_by_factor(X: Tensor, via: str, method: WhiteningMethod, eps: float, rank: Rank, solver: str | Solver) -> bool:
    """Whether the covariance is not formed; refuses what cannot do without it."""
    if via not in get_args(Via):
        raise ValueError(f"via must be one of {', '.join(get_args(Via))}, got {via!r}")
    taken = {
        "method": (method, method in ("zca", "cholesky")),
        "rank": (rank, rank in ("ridge", "pinv")),
        "solver": (solver, solver == "auto"),
    }
    if via == "factor":
        for name, (value, fits) in taken.items():
            if not fits:
                raise ValueError(f"{name}={value!r} needs the covariance: take via='covariance' or 'auto'")
        return True
    # Where the factor was measured to be faster: benchmarks/when_does_the_factor_pay.py.
    few = 2 * X.shape[-1] <= X.shape[-2] and (eps > 0.0 or rank == "pinv")
    return via == "auto" and few and method == "zca" and all(fits for _, fits in taken.values())


def _require_definite(P: Tensor, info: Tensor) -> None:
    """Refuse what the Cholesky factorisation could not finish; not under ``torch.func``, where values are not read."""
    if not readable(P) or not (info != 0).any():
        return
    require_finite(P, "P")
    raise NotPositiveSemidefiniteError(
        f"P is singular up to rounding in {P.dtype}{bad_indices(info != 0)}{place()}: it has no Cholesky factor; "
        "give eps > 0, or method='zca' with rank='pinv'"
    )


def _principal_axes(P: Tensor) -> Tensor:
    """Eigenvectors in columns by falling eigenvalue, each with its largest entry positive.

    Their first derivative is dU = U (F ∘ (Uᴴ dP U)) with F_ij = 1/(λj − λi), and 0 for pairs tied up to rounding.
    """
    eigvals, U = eigenpairs(P)
    eigvals, U = eigvals.flip(-1), U.flip(-1)
    gap = eigvals.unsqueeze(-2) - eigvals.unsqueeze(-1)
    F = reciprocal_or_zero(torch.where(gap.abs() > rank_tolerance(eigvals).unsqueeze(-1), gap, 0.0))
    inside = U.mH @ P @ U
    axes = U + U @ (F * (inside - inside.detach()))
    # The phase is a function of P too.
    top = axes.gather(-2, U.abs().argmax(-2, keepdim=True))
    return axes * (top.conj() / top.abs())
