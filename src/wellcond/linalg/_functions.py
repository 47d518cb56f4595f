"""Power, logarithm and exponential of Hermitian matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from wellcond._shared.checks import require_matrix, require_nonnegative
from wellcond._shared.precision import full_precision, working_dtype

from ._daleckii_krein import apply_function
from ._divided_differences import Exp, Log, Power, ScalarFunction
from ._rank import Rank, Shift, eigenpairs, on_kept_eigenvalues, require_rank_policy


def powm(P: Tensor, exponent: float, *, eps: float = 0.0, rank: Rank = "ridge") -> Tensor:
    """(P + εI)^exponent of a Hermitian positive (semi)definite P.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        exponent: any finite real number. For ±1/2 :func:`sqrtm` and :func:`invsqrtm` are cheaper to differentiate
            twice.
        eps, rank: what is done to eigenvalues that are zero up to rounding, as in :func:`invsqrtm`.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive semidefinite (read on the CPU by default), or
            singular for a negative exponent with neither ε nor a policy; a non-finite exponent, an unknown policy.
        DecompositionError: every step of the fall-back chain failed.

    At an eigenvalue 0 with ε = 0 the derivative of a power below 1 does not exist; null pairs contribute 0 there.

    Complexity: one eigendecomposition and one product; four products backward; O(d³) memory for second derivatives.
    Source: Daleckii and Krein 1965; Higham, Functions of Matrices, 2008, ch. 3.

    Example:
        >>> import torch
        >>> powm(torch.diag(torch.tensor([4.0, 9.0])), 1.5)
        tensor([[ 8.,  0.],
                [ 0., 27.]])
    """
    if not math.isfinite(exponent):
        raise ValueError(f"exponent must be a finite number, got {exponent}")
    return functions_of(P, (Power(float(exponent)),), eps, rank, invertible=exponent < 0)[0]


def logm(P: Tensor, *, eps: float = 0.0, rank: Rank = "ridge") -> Tensor:
    """The principal logarithm log(P + εI) of a Hermitian positive definite P.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian; any floating or complex dtype, half precision is computed
            in float32.
        eps, rank: what is done to eigenvalues that are zero up to rounding, as in :func:`invsqrtm`.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite (read on the CPU by default), an unknown
            policy.
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
        S: (..., d, d) real symmetric or complex Hermitian. For other matrices take ``torch.linalg.matrix_exp``.

    Returns:
        (..., d, d) Hermitian positive definite, in the dtype of S.

    Raises:
        TypeError: S is not a floating or complex tensor.
        ValueError: S is not square, finite or Hermitian (read on the CPU by default).
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
        # exp(S) = I + S + …: an asymmetry counts beside 1, not beside a small S (as in a mean that converges).
        return apply_function(work, Exp(), *eigenpairs(work, unit=1.0)).to(S.dtype)


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
        return tuple(apply_function(work, on_kept_eigenvalues(f, rank), *pairs).to(P.dtype) for f in functions)
