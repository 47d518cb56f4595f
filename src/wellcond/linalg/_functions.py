"""Power, logarithm and exponential of Hermitian matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond._shared.checks import readable, require_matrix, require_nonnegative
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import under_forward_mode, under_functorch

from ._rank import Rank, Shift, eigenpairs, require_rank_policy
from .derivatives import Exp, Log, Power, ScalarFunction, apply_function, on_kept_eigenvalues, under_policy


def powm(P: Tensor, exponent: float | Tensor, *, eps: float = 0.0, rank: Rank = "ridge") -> Tensor:
    """(P + εI)^exponent of a Hermitian positive (semi)definite P.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        exponent: any finite real number. For ±1/2 :func:`sqrtm` and :func:`invsqrtm` are cheaper to differentiate
            twice. Or a real tensor, a scalar or one exponent per matrix (broadcast with the leading dimensions of P),
            which gets its gradient tr(Gᴴ log(P) P^exponent); then P must be positive definite, or ε positive.
        eps, rank: treatment of eigenvalues that are zero up to rounding, as in :func:`invsqrtm`; not ``"pinv"`` with a
            tensor of exponents.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive semidefinite (checked on the CPU by default), or
            singular for a negative exponent with neither ε nor a policy; a non-finite exponent, an unknown policy.
        DecompositionError: every step of the fall-back chain failed.

    At eigenvalues that are zero up to rounding, the derivative of a power below 1 does not exist with ε = 0; null pairs
    contribute 0 there.

    Complexity: one eigendecomposition and one product; four products backward; O(d³) memory for second derivatives.
    Source: Daleckii and Krein 1965; Higham, Functions of Matrices, 2008, ch. 3.

    Example:
        >>> import torch
        >>> powm(torch.diag(torch.tensor([4.0, 9.0])), 1.5)
        tensor([[ 8.,  0.],
                [ 0., 27.]])
    """
    exponent = require_exponent(exponent, rank)
    if isinstance(exponent, Tensor):
        return _tensor_power(P, exponent, eps, rank)
    return functions_of(P, (Power(exponent),), eps, rank, invertible=exponent < 0)[0]


def logm(P: Tensor, *, eps: float = 0.0, rank: Rank = "ridge") -> Tensor:
    """The principal logarithm log(P + εI) of a Hermitian positive definite P.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        eps, rank: treatment of eigenvalues that are zero up to rounding, as in :func:`invsqrtm`.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite (checked on the CPU by default), or the
            policy is unknown.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: one eigendecomposition and one product; four products backward; O(d³) memory for second derivatives.
    Source: Daleckii and Krein 1965; Higham, Functions of Matrices, 2008, ch. 3 and 11.

    Example:
        >>> import torch
        >>> logm(torch.eye(2))
        tensor([[0., 0.],
                [0., 0.]])
    """
    return functions_of(P, (Log(),), eps, rank, invertible=True)[0]


def expm(S: Tensor) -> Tensor:
    """The exponential of a Hermitian matrix, which need not be definite: the inverse of :func:`logm`.

    Args:
        S: (..., d, d) real symmetric or complex Hermitian, any floating or complex dtype; half precision is computed in
            float32. For other matrices use ``torch.linalg.matrix_exp``.

    Returns:
        (..., d, d) Hermitian positive definite, in the dtype of S.

    Raises:
        TypeError: S is not a floating or complex tensor.
        ValueError: S is not square, finite or Hermitian (checked on the CPU by default).
        DecompositionError: every step of the fall-back chain failed.

    Complexity: one eigendecomposition and one product; four products backward; O(d³) memory for second derivatives.
    Source: Daleckii and Krein 1965; Higham, Functions of Matrices, 2008, ch. 3 and 10.

    Example:
        >>> import torch
        >>> expm(torch.zeros(2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    require_matrix(S, "S", square=True)
    with full_precision(S):
        work = S.to(working_dtype(S.dtype))
        # exp(S) = I + S + …: asymmetry is relative to 1, not to a small S (as in a mean that converges).
        return apply_function(work, Exp(), *eigenpairs(work, unit=1.0)).to(S.dtype)


def require_exponent(exponent: float | Tensor, rank: str) -> float | Tensor:
    """The exponent as a float, unless it is a tensor that is differentiated or has several entries."""
    if not isinstance(exponent, Tensor):
        if not math.isfinite(exponent):
            raise ValueError(f"exponent must be a finite number, got {exponent}")
        return float(exponent)
    if exponent.is_complex():
        raise TypeError(f"exponent must be real, got a tensor of {exponent.dtype}")
    if readable(exponent) and not torch.isfinite(exponent).all():
        raise ValueError(f"exponent must be finite, got {exponent.tolist()}")
    if exponent.ndim == 0 and not (exponent.requires_grad or under_forward_mode() or under_functorch()):
        return exponent.item()
    if rank == "pinv":
        raise ValueError("rank='pinv' takes one number for an exponent; give a tensor of exponents eps > 0 instead")
    return exponent


def _tensor_power(P: Tensor, exponent: Tensor, eps: float, rank: Rank) -> Tensor:
    """exp(p log P) from one decomposition: by the chain rule, divided differences multiply to those of the power."""
    require_matrix(P, "P", square=True)
    require_nonnegative(eps, "eps")
    require_rank_policy(rank, eps)
    with full_precision(P):
        work = P.to(working_dtype(P.dtype))
        eigvals, U = eigenpairs(work, Shift(float(eps), rank, invertible=True))
        log = on_kept_eigenvalues(Log(), rank)
        p = exponent.to(device=P.device, dtype=eigvals.dtype)
        scaled = p[..., None, None] * apply_function(work, log, eigvals, U)
        return apply_function(scaled, Exp(), p.detach()[..., None] * log.values(eigvals), U).to(P.dtype)


def functions_of(
    P: Tensor, functions: Sequence[ScalarFunction], eps: float, rank: Rank, *, invertible: bool
) -> tuple[Tensor, ...]:
    """Functions of P + εI under a rank policy, from one decomposition."""
    require_matrix(P, "P", square=True)
    require_nonnegative(eps, "eps")
    require_rank_policy(rank, eps)
    if P.shape[-1] == 0:
        return tuple(P.clone() for _ in functions)
    with full_precision(P):
        work = P.to(working_dtype(P.dtype))
        pairs = eigenpairs(work, Shift(float(eps), rank, invertible))
        return tuple(apply_function(work, under_policy(f, rank, eps), *pairs).to(P.dtype) for f in functions)
