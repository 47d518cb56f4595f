"""Whitening of features, through their covariance or without it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, widened, working_dtype
from wellcond._shared.products import largest_absolute, positive_or_one
from wellcond._shared.torch_internals import in_breakable_graph, in_onnx_export, run_in_python

from .._covariance import centred_factor, require_features
from .._rank import Rank
from ..solvers import Solver, choose_solver
from ._factor import require_samples, white_factor
from ._matrix import WhiteningMethod, matrix_of, require_options

# Up to this many rows, reading them in Python is faster than more tensor operations.
FEW_ROWS = 64

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
    """Features with mean zero and the identity as covariance: W (X − mean) with W (P + εI) Wᴴ = I.

    Args:
        X: (..., d, n) features, n samples of d channels; any floating or complex dtype, half precision is computed
            in float32.
        eps: ε ≥ 0; singular covariances (such as those with n ≤ d) need ε > 0 or another ``rank`` policy.
        method: ``"zca"``, ``"pca"`` (rows by descending eigenvalue, each eigenvector with a positive largest entry) or
            ``"cholesky"`` (lower triangular W).
        relative: whether ε is in units of the mean eigenvalue tr P/d, so that ``whiten(c * X) == whiten(X)``.
        rank: as in :func:`invsqrtm`; for ZCA only.
        correction: as in :func:`covariance`.
        solver: for the inverse root of ZCA and PCA, as in :func:`sqrtm`.
        via: ``"covariance"`` forms P = A Aᴴ, which resolves κ(P) up to 1/eps of the dtype; ``"factor"`` decomposes the
            features themselves, which resolves κ(P) up to 1/eps² (ZCA and Cholesky, with ``rank="ridge"`` or
            ``"pinv"``). ``"auto"`` uses the factor for a regularised ZCA of at least twice as many channels as samples,
            where it is also faster, and for ``rank="pinv"``; otherwise P, where the factor takes 1.3 to 4 times as
            long.

    Returns:
        (..., d, n) in the dtype of X.

    Raises:
        TypeError: X is not a floating or complex tensor.
        ValueError: fewer than two dimensions, n ≤ correction, NaN or infinity, a singular covariance without ε or a
            policy (both checked on the CPU by default); an unknown method, solver or policy, or a combination that is
            not possible.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: two products of d × d by d × n and O(d³); with the factor, O(d n min(d, n)). ZCA and Cholesky
    differentiate to every order at any spectrum; PCA once, and only where the eigenvalues are simple (tied pairs
    contribute 0). Source: Kessy, Lewin and Strimmer, The American Statistician, 2018.

    Example:
        >>> import torch
        >>> Y = whiten(torch.randn(3, 100), method="cholesky")
        >>> torch.allclose(torch.cov(Y, correction=0), torch.eye(3), atol=1e-5)
        True
    """
    require_options(method, eps, rank, solver)
    require_features(X, correction)
    if in_breakable_graph() and not (method == "zca" and choose_solver(solver).traceable):
        given = {"eps": eps, "method": method, "relative": relative, "rank": rank, "correction": correction}
        return run_in_python(whiten, X, **given, solver=solver, via=via)
    by_factor = _goes_by_factor(X, via, method, eps, rank, solver)
    if X.numel() == 0:
        return X.clone()
    with full_precision(X):
        # Double precision where the rank of the features matters, which is only so without a ridge.
        A = centred_factor(widened(X) if by_factor and eps == 0.0 else X, correction)
        root_n = (X.shape[-1] - correction) ** 0.5
        A = _without_constants(X, A, root_n)
        scale: Tensor | float = 1.0
        if relative or eps == 0.0:
            # The result does not depend on the scale of the features: choose one that keeps P in range.
            scale = positive_or_one(largest_absolute(A.detach(), (-2, -1)))
            if relative and eps:
                size = (A / scale).abs().square().sum((-2, -1), keepdim=True) / A.shape[-2]
                scale = scale * positive_or_one(size).sqrt()
            if relative or not readable(A) or (scale.log10().abs() > 6).any():
                A = A / scale
            else:
                scale = 1.0
        if by_factor:
            white = white_factor(X, A, scale, method, eps, rank)
        else:
            if eps == 0.0 and rank == "ridge":
                require_samples(A)
            white = matrix_of(A @ A.mH, method, eps, rank, solver) @ A
        return (white * root_n).to(X.dtype)


def _goes_by_factor(X: Tensor, via: str, method: WhiteningMethod, eps: float, rank: Rank, solver: str | Solver) -> bool:
    """Whether to whiten without forming the covariance; raises if that is asked for and not possible."""
    require_known(via, get_args(Via), "way to whiten")
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
    # The rank is decided on the features: the P of a constant channel shows only the rounding of the mean.
    few = rank == "pinv" or (2 * X.shape[-1] <= X.shape[-2] and eps > 0.0 and not in_onnx_export())
    return via == "auto" and few and method == "zca" and all(fits for _, fits in taken.values())


def _without_constants(X: Tensor, A: Tensor, root_n: float) -> Tensor:
    """A with 0 for channels whose variance is below (eps·mean)², the rounding of their samples.

    The rounded mean of a constant channel leaves a difference that is the same everywhere: no variance either.
    """
    rows = A.detach()
    reads = readable(X)
    few = type(rows) is Tensor and rows.shape[:-1].numel() <= FEW_ROWS  # a subclass may have no values to list
    if reads and few and not _near_a_constant(X.detach(), rows, root_n):
        return A
    mean = (X[..., :1].detach() - rows[..., :1] * root_n).abs()
    rounding = torch.finfo(working_dtype(X.dtype)).eps * mean
    # A cheaper test that includes this difference, which is at most some ten times the rounding.
    if reads and not (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) <= 16 * rounding).any():
        return A
    unit = largest_absolute(rows, -1)  # squares of tiny ones would vanish
    deviation = (rows / unit).std(-1, correction=0, keepdim=True) * unit * root_n  # NaN for rows of zeros, which stay
    return A.masked_fill(deviation < rounding, 0.0)


def _near_a_constant(X: Tensor, rows: Tensor, root_n: float) -> bool:
    """Whether some channel may be constant, by a bound on its mean and in as few operations as possible."""
    eps = torch.finfo(working_dtype(X.dtype)).eps
    sizes, first = torch.linalg.vector_norm(rows, dim=-1).flatten().tolist(), X[..., 0].flatten().tolist()
    # |mean| is at most |first sample| plus its deviation, which is at most the norm of all deviations.
    return not all(size > 16 * eps * (abs(x) + root_n * size) for size, x in zip(sizes, first, strict=True))
