"""Roots with a status for every matrix instead of an exception, without reading a value: the ``_ex`` forms.

With solvers that only multiply matrices the host never waits for the device. ``torch.linalg.eigh`` reports failures to
the host and so always synchronises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.checks import require_matrix, value_checks
from wellcond._shared.precision import working_dtype
from wellcond._shared.products import identity

from ._roots import invsqrtm, sqrtm
from .lapack import nan_for_failures
from .solvers import Root, Solver, relative_residual

OK, NOT_FINITE, NOT_ACCURATE = 0, 1, 2


class RootStatus(NamedTuple):
    """A root, its residual, and a status code for each matrix.

    Attributes:
        root: (..., d, d); NaN, with gradient zero, where the status is 1.
        residual: (...,) ‖Q² − P‖/‖P‖ of a square root, ‖S P S − I‖/‖I‖ of an inverse one (P + εI for P).
        info: (...,) int32: 0 good; 1 the matrix contains NaN or infinity, or could not be decomposed; 2 the residual
            exceeds the tolerance: the matrix is not Hermitian, indefinite or too ill-conditioned, or the solver is
            approximate.

    Example:
        >>> import torch
        >>> root, residual, info = sqrtm_ex(torch.eye(3))
        >>> residual.item() < 1e-5, info.item()
        (True, 0)
    """

    root: Tensor
    residual: Tensor
    info: Tensor


def sqrtm_ex(
    P: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", tolerance: float | None = None
) -> RootStatus:
    """:func:`sqrtm` with a status for every matrix: no value raises, and none is read.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: a name in :data:`SOLVERS`, a configured solver, or ``"auto"``.
        tolerance: residual above which ``info`` is 2; by default 10·d·eps of the working dtype, the rounding of an
            exact solver.

    Returns:
        :class:`RootStatus`; a bad matrix does not affect the others of its batch.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, or the solver is unknown; values never raise.

    Complexity: :func:`sqrtm` and one product. Source: Higham, Functions of Matrices, 2008, ch. 6.

    Example:
        >>> import torch
        >>> sqrtm_ex(torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])).info
        tensor([0, 1], dtype=torch.int32)
    """
    return _with_status(P, "sqrt", eps, solver, tolerance)


def invsqrtm_ex(
    P: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", tolerance: float | None = None
) -> RootStatus:
    """:func:`invsqrtm` with a status for every matrix: no value raises, and none is read.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: a name in :data:`SOLVERS`, a configured solver, or ``"auto"``.
        tolerance: residual above which ``info`` is 2; by default 10·d·eps of the working dtype. It grows with κ:
            choose it larger for ill-conditioned matrices.

    Returns:
        :class:`RootStatus`; a bad matrix does not affect the others of its batch.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, or the solver is unknown; values never raise.

    Complexity: :func:`invsqrtm` and two products. Source: Higham, Functions of Matrices, 2008, ch. 6.

    Example:
        >>> import torch
        >>> invsqrtm_ex(torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])).info
        tensor([0, 1], dtype=torch.int32)
    """
    return _with_status(P, "invsqrt", eps, solver, tolerance)


def _with_status(P: Tensor, which: Root, eps: float, solver: str | Solver, tolerance: float | None) -> RootStatus:
    require_matrix(P, "P", square=True)
    dtype = working_dtype(P.dtype)
    if tolerance is None:
        tolerance = 10 * P.shape[-1] * torch.finfo(dtype).eps
    finite = torch.isfinite(P).all(-1).all(-1)
    with value_checks(False), nan_for_failures():
        root = (sqrtm if which == "sqrt" else invsqrtm)(
            torch.where(finite[..., None, None], P, identity(P)), eps=eps, solver=solver
        )
    with torch.no_grad():
        residual = relative_residual(P.to(dtype), root.to(dtype), which, eps)
        known = finite & torch.isfinite(root).all(-1).all(-1)
        info = torch.where(residual <= tolerance, OK, NOT_ACCURATE).masked_fill(~known, NOT_FINITE).to(torch.int32)
    return RootStatus(torch.where(known[..., None, None], root, torch.nan), residual, info)
