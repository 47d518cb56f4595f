"""Square root, powers and logarithm of a covariance straight from its features, by the factor form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import require_nonnegative
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, wide_dtype, widened, working_dtype
from wellcond._shared.torch_internals import in_breakable_graph, in_onnx_export, run_in_python

from ._covariance import centred_factor, require_features
from ._factor_derivatives import Options
from ._factor_function import FactorFunction
from ._functions import expm, require_exponent
from ._rank import require_rank_policy
from ._roots import invsqrtm, sqrtm
from .derivatives import Log, Power, ScalarFunction, on_kept_eigenvalues
from .solvers import Eigh, Solver, choose_solver

FactorRank = Literal["ridge", "pinv", "raise"]


def covariance_sqrtm(
    X: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", rank: FactorRank = "ridge", correction: int = 0
) -> Tensor:
    """The square root (P + εI)^{1/2} of the covariance of features, as used by global covariance pooling.

    The gradient is bounded by √2 times the incoming one whatever the condition number, also at rank deficiency. The
    work is done on the smaller side of the features: the n × n one for a 7 × 7 map of 256 channels, else the d × d one.

    Args:
        X: (..., d, n) features; any floating or complex dtype, half precision is taken as float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: ``"auto"`` and ``"eigh"`` use the factor form; any other computes the root of the covariance, as in
            :func:`sqrtm`.
        rank: treatment of eigenvalues that may be rounding errors of the features, up to eps² ‖X‖²_F/n: ``"ridge"``
            counts them as 0 and adds ε; ``"pinv"`` takes the function on the rest alone, without ε; ``"raise"``
            raises an error.
        correction: the divisor of the covariance is n − correction.

    Returns:
        (..., d, d) Hermitian positive semidefinite, in the dtype of X.

    Raises:
        TypeError: X is not a floating or complex tensor.
        ValueError: fewer than two dimensions, n ≤ correction, NaN or infinity in X (checked on the CPU by default), a
            covariance that the policy or the solver does not accept, an unknown solver or policy.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d n min(d, n) + d² min(d, n)), in float64. Derivatives of every order. Source: Daleckii–Krein on the
    factor; the bound is that of Araki and Yamagami 1981 for the map A ↦ (A Aᴴ)^{1/2}.

    Example:
        >>> import torch
        >>> covariance_sqrtm(torch.tensor([[3.0, -3.0], [0.0, 0.0], [4.0, -4.0]]))
        tensor([[1.8000, 0.0000, 2.4000],
                [0.0000, 0.0000, 0.0000],
                [2.4000, 0.0000, 3.2000]])
    """
    return _from_features(X, Power(0.5), eps, solver, rank, correction)


def covariance_powm(
    X: Tensor,
    exponent: float | Tensor,
    *,
    eps: float = 0.0,
    solver: str | Solver = "auto",
    rank: FactorRank = "ridge",
    correction: int = 0,
) -> Tensor:
    """The power (P + εI)^exponent of the covariance of features.

    Args:
        X: (..., d, n) features; any floating or complex dtype, half precision is taken as float32.
        exponent: any finite real number; 1/2 is :func:`covariance_sqrtm`. Or a real tensor, a scalar or one exponent
            per matrix, which gets its gradient; then P must be positive definite, or ε positive.
        eps: ε ≥ 0, added to every eigenvalue; positive for negative exponents where P is singular, as it is for n ≤ d.
        solver: ``"auto"`` and ``"eigh"`` use the factor form; any other takes the covariance, for exponents ±1/2 only.
        rank: as in :func:`covariance_sqrtm`: ``"ridge"``, ``"pinv"`` or ``"raise"``.
        correction: the divisor of the covariance is n − correction.

    Returns:
        (..., d, d) Hermitian, in the dtype of X.

    Raises:
        TypeError: X is not a floating or complex tensor, or the exponent is complex.
        ValueError: fewer than two dimensions, n ≤ correction, NaN or infinity in X (checked on the CPU by default); a
            non-finite exponent; a singular P with a negative exponent and neither ε nor ``"pinv"``; a solver without
            such a power, an unknown solver or policy.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d n min(d, n) + d² min(d, n)), also backward, in float64. Exponents ±1/2 differentiate to every order,
    others twice, with O(d³) memory. With ε = 0 the derivative exists at rank deficiency for exponents ≥ 1/2; below,
    null pairs contribute 0. Source: Daleckii–Krein on the factor.

    Example:
        >>> import torch
        >>> covariance_powm(torch.tensor([[2.0, -2.0], [0.0, 0.0]]), 1.5)
        tensor([[8., 0.],
                [0., 0.]])
    """
    exponent = require_exponent(exponent, rank)
    if not isinstance(exponent, Tensor):
        return _from_features(X, Power(exponent), eps, solver, rank, correction)
    with full_precision(X):
        log = _from_features(X.to(working_dtype(X.dtype)), Log(), eps, solver, rank, correction)
        p = exponent.to(device=X.device, dtype=log.real.dtype)
        return expm(p[..., None, None] * log).to(X.dtype)


def covariance_logm(
    X: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", rank: FactorRank = "ridge", correction: int = 0
) -> Tensor:
    """The logarithm log(P + εI) of the covariance of features, as used by the log-Euclidean metric.

    Args:
        X: (..., d, n) features; any floating or complex dtype, half precision is taken as float32.
        eps: ε ≥ 0; must be positive if P is singular, as it is for n ≤ d. The gradient in A is at most 1.61/√ε times
            the incoming one, twice the maximum of log(1 + σ²/ε)/σ.
        solver: ``"auto"`` or ``"eigh"``, the factor form; no other solver has a logarithm.
        rank: as in :func:`covariance_sqrtm`; with ``"pinv"`` the logarithm acts on the range of P, and is 0 outside.
        correction: the divisor of the covariance is n − correction.

    Returns:
        (..., d, d) Hermitian, in the dtype of X.

    Raises:
        TypeError: X is not a floating or complex tensor.
        ValueError: fewer than two dimensions, n ≤ correction, NaN or infinity in X (checked on the CPU by default); a
            singular P with neither ε nor ``"pinv"``; another solver, an unknown policy.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d n min(d, n) + d² min(d, n)), also backward, in float64. Second derivatives and forward mode work on
    the d × d side, second derivatives with O(d³) memory. There are no third derivatives. Source: Daleckii–Krein on the
    factor.

    Example:
        >>> import torch
        >>> covariance_logm(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), eps=1.0)
        tensor([[0.6931, 0.0000],
                [0.0000, 0.0000]])
    """
    return _from_features(X, Log(), eps, solver, rank, correction)


def _from_features(
    X: Tensor, f: ScalarFunction, eps: float, solver: str | Solver, rank: FactorRank, correction: int
) -> Tensor:
    require_features(X, correction)
    require_nonnegative(eps, "eps")
    require_known(rank, get_args(FactorRank), "rank policy for features")
    require_rank_policy(rank, eps)
    by_factor = isinstance(choose_solver(solver), Eigh)
    if by_factor and in_breakable_graph():
        return run_in_python(_from_features, X, f, eps, solver, rank, correction)
    root = {0.5: sqrtm, -0.5: invsqrtm}.get(f.exponent) if isinstance(f, Power) else None
    if root is None and not by_factor:
        raise ValueError(f"solver={solver!r} computes the roots ±1/2 only; take solver='auto' here")
    with full_precision(X):
        work = X.to(working_dtype(X.dtype))
        if X.shape[-2] == 0:
            return X @ X.mH
        if root is not None and not by_factor:
            A = centred_factor(work, correction)
            return root(A @ A.mH, eps=eps, solver=solver, rank=rank).to(X.dtype)
        if root is not None and solver == "auto" and rank == "ridge" and in_onnx_export():
            return _root_by_products(work, root, eps, correction).to(X.dtype)
        scale: Tensor | float = 1.0
        if isinstance(f, Power) and eps == 0.0 and work.dtype == wide_dtype(work):
            # Squares of double-precision features may leave the range; powers of P are equivariant to their unit.
            largest = work.detach().abs().amax((-2, -1), keepdim=True)
            unit = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
            work, scale = work / unit, unit.pow(2 * f.exponent)
        invertible = not isinstance(f, Power) or f.exponent < 0
        refuse = rank == "raise" or (invertible and eps == 0.0 and rank == "ridge")
        F, *_ = FactorFunction.call(work, Options(on_kept_eigenvalues(f, rank), float(eps), correction, refuse))
        return (F if isinstance(scale, float) else F * scale).to(X.dtype)


def _root_by_products(X: Tensor, root: Callable[..., Tensor], eps: float, correction: int) -> Tensor:
    """The root of a covariance for ONNX, in double precision; on the smaller side as A (Aᴴ A)^{-1/2} Aᴴ."""
    A = centred_factor(widened(X), correction)
    if root is sqrtm and eps == 0.0 and X.shape[-1] < X.shape[-2]:
        return A @ invsqrtm(A.mH @ A) @ A.mH
    return root(A @ A.mH, eps=eps)
