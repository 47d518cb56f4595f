"""The matrix that whitens: W with W (P + εI) Wᴴ = I, of a covariance P."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from wellcond._shared.checks import hermitian, readable, require_matrix, require_nonnegative
from wellcond._shared.precision import full_precision, working_dtype

from ._roots import invsqrtm
from ._whiten import WhiteningMethod, _principal_axes, _require_definite
from .solvers import Eigh, Solver, choose_solver


def whitening_matrix(
    P: Tensor,
    *,
    eps: float = 0.0,
    method: WhiteningMethod = "zca",
    relative: bool = False,
    solver: str | Solver = "auto",
) -> Tensor:
    """The whitening matrix of a covariance, in the form that :func:`whiten` applies to features.

    Args:
        P: (..., d, d) Hermitian positive (semi)definite; any floating or complex dtype, half precision is computed
            in float32.
        eps, method, relative, solver: as for :func:`whiten`.

    Returns:
        (..., d, d) in the dtype of P: (P + εI)^{-1/2} for ``"zca"``, eigenvectors in rows by falling eigenvalue over
        the roots of their eigenvalues for ``"pca"``, lower triangular for ``"cholesky"``.

    Raises:
        TypeError, ValueError, DecompositionError: as :func:`whiten`.

    Complexity: O(d³) per matrix. ZCA and Cholesky differentiate to every order at any spectrum; PCA once, and only
    where the eigenvalues are simple (tied pairs contribute 0).

    Example:
        >>> import torch
        >>> whitening_matrix(torch.diag(torch.tensor([4.0, 16.0])), method="pca")
        tensor([[0.0000, 0.2500],
                [0.5000, 0.0000]])
    """
    require_method(method, solver)
    require_nonnegative(eps, "eps")
    require_matrix(P, "P", square=True)
    if P.shape[-1] == 0:
        return P.clone()
    with full_precision(P):
        work = P.to(working_dtype(P.dtype))
        scale = None
        if relative:
            scale = work.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
            scale = torch.where(scale > 0, scale, 1.0)
            work = work / scale
        if method == "cholesky":
            eye = torch.eye(work.shape[-1], dtype=work.dtype, device=work.device)
            symmetric = hermitian(work) if readable(work) else (work + work.mH) / 2
            L, info = torch.linalg.cholesky_ex(symmetric + eps * eye)
            _require_definite(work, info)
            W = torch.linalg.solve_triangular(L, eye, upper=False)
        else:
            W = invsqrtm(work, eps=eps, solver=solver)
            if method == "pca":
                W = _principal_axes((work + work.mH) / 2).mH @ W
        return (W if scale is None else W / scale.sqrt()).to(P.dtype)


def require_method(method: str, solver: str | Solver) -> None:
    """Refuse an unknown method, and a solver that the method would not use."""
    if method not in get_args(WhiteningMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(WhiteningMethod))}, got {method!r}")
    if not isinstance(choose_solver(solver), Eigh) and method == "cholesky":
        raise ValueError(f"method='cholesky' takes no solver, got {solver!r}")
