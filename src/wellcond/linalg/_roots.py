"""The matrix square root, its inverse, and both at once: P^{1/2} and (P + εI)^{-1/2} of eq. (4)."""

from __future__ import annotations

from torch import Tensor

from wellcond._shared.checks import require_matrix, require_nonnegative
from wellcond._shared.precision import HALF, full_precision
from wellcond._shared.torch_internals import in_onnx_export, is_compiling

from ._functions import functions_of
from ._rank import Rank, require_rank_policy
from .derivatives import Power
from .solvers import Eigh, Root, Solved, Solver, Traced, choose_solver, in_reach_of_products


def sqrtm(P: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", rank: Rank = "ridge") -> Tensor:
    """The positive semidefinite square root (P + εI)^{1/2}.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian, positive semidefinite; any floating or complex dtype.
            Half precision is computed in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: a name in :data:`wellcond.linalg.SOLVERS`, a configured solver, or ``"auto"``, which
            :func:`auto_solver` resolves.
        rank: treatment of eigenvalues that are zero up to rounding, as in :func:`invsqrtm`. Zero has a root, so
            ``"ridge"`` with ε = 0 accepts a singular P, and sets them to zero in the derivative only.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive semidefinite, each beyond rounding, or the solver is
            unknown. Values are checked on the CPU, elsewhere inside ``value_checks(True)``; solvers that only multiply
            matrices do not see the eigenvalues, and do not detect an indefinite P.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d³) per matrix. With the default solver the derivative is exact at repeated eigenvalues, to every
    order; at eigenvalues that are zero up to rounding with ε = 0, where it does not exist, null pairs contribute 0.
    Source: Higham, Functions of Matrices, 2008, ch. 6; eq. (3)–(4) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])))
        tensor([[2., 0.],
                [0., 3.]])
    """
    return _roots(P, ("sqrt",), eps, solver, rank)[0]


def invsqrtm(P: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", rank: Rank = "ridge") -> Tensor:
    """The inverse square root (P + εI)^{-1/2}: the ZCA whitening matrix of a covariance P.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian, positive definite; any floating or complex dtype. Half
            precision is computed in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: a name in :data:`wellcond.linalg.SOLVERS`, a configured solver, or ``"auto"``.
        rank: treatment of eigenvalues that are zero up to rounding (d·eps of the largest): ``"ridge"`` adds ε to all
            (with ε = 0 they are an error); ``"pinv"`` inverts on the range only; ``"floor"`` raises them to the
            tolerance; ``"raise"`` makes them an error. Clamped eigenvalues have no gradient of their own. Policies
            other than ``"ridge"`` and ``"raise"`` use an eigendecomposition and differentiate twice.

    Returns:
        (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite, each beyond rounding (the last three are
            checked on the CPU, elsewhere inside ``value_checks(True)``); an unknown solver or policy, or ε with a
            policy that does not use it.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d³) per matrix. With the default solver derivatives of every order are exact at repeated eigenvalues.
    Source: Higham, Functions of Matrices, 2008, ch. 6; eq. (3)–(4) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> invsqrtm(torch.diag(torch.tensor([4.0, 16.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    return _roots(P, ("invsqrt",), eps, solver, rank)[0]


def sqrtm_invsqrtm(
    P: Tensor, *, eps: float = 0.0, solver: str | Solver = "auto", rank: Rank = "ridge"
) -> tuple[Tensor, Tensor]:
    """Both (P + εI)^{1/2} and (P + εI)^{-1/2} from one decomposition.

    Args:
        P: (..., d, d) real symmetric or complex Hermitian, positive definite; any floating or complex dtype. Half
            precision is computed in float32.
        eps: ε ≥ 0, added to every eigenvalue.
        solver: a name in :data:`wellcond.linalg.SOLVERS`, a configured solver, or ``"auto"``.
        rank: treatment of eigenvalues that are zero up to rounding, as in :func:`invsqrtm`.

    Returns:
        Two tensors (..., d, d) in the dtype of P.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite, each beyond rounding (the last three are
            checked on the CPU, elsewhere inside ``value_checks(True)``); an unknown solver or policy, or ε with a
            policy that does not use it.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: that of :func:`invsqrtm` and one product. Source: Higham, Functions of Matrices, 2008, ch. 6; eq.
    (3)–(4) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> Q, S = sqrtm_invsqrtm(torch.diag(torch.tensor([4.0, 16.0])))
        >>> Q @ S
        tensor([[1., 0.],
                [0., 1.]])
    """
    Q, S = _roots(P, ("sqrt", "invsqrt"), eps, solver, rank)
    return Q, S


EXPONENTS: dict[Root, float] = {"sqrt": 0.5, "invsqrt": -0.5}


def _roots(P: Tensor, roots: tuple[Root, ...], eps: float, solver: str | Solver, rank: Rank) -> tuple[Tensor, ...]:
    if rank != "ridge":
        require_rank_policy(rank, eps)
        if solver != "auto" and not isinstance(choose_solver(solver), Eigh):
            raise ValueError(f"rank={rank!r} needs the eigenvalues: take solver='eigh' or 'auto', not {solver!r}")
        return functions_of(P, [Power(EXPONENTS[root]) for root in roots], eps, rank, invertible="invsqrt" in roots)
    require_matrix(P, "P", square=True)
    require_nonnegative(eps, "eps")
    chosen = choose_solver(solver, P)
    if P.shape[-1] == 0:
        return tuple(P.clone() for _ in roots)
    with full_precision(P):
        work = P.float() if P.dtype in HALF else P
        if solver == "auto" and in_onnx_export():
            work = in_reach_of_products(work, eps)
        if chosen.traceable and is_compiling():
            out = Traced.apply(work, chosen, roots, float(eps))
        else:
            out = Solved.call(work, chosen, roots, float(eps))
        found = out[: len(roots)]  # pyright: ignore[reportOptionalSubscript]
        return found if found[0].dtype == P.dtype else tuple(root.to(P.dtype) for root in found)
