"""Whitening of features, through their covariance or without it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, widened, working_dtype
from wellcond._shared.products import positive_or_one
from wellcond._shared.torch_internals import in_onnx_export

from .._covariance import centred_factor, require_features
from .._rank import Rank
from ..solvers import Solver
from ._factor import require_samples, white_factor
from ._matrix import WhiteningMethod, matrix_of, require_options

# Rows up to which Python looks at them faster than as many operations do.
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
            samples, where it is faster too, and for ``rank="pinv"``; P elsewhere, where the factor takes 1.3 to 4 times
            as long.

    Returns:
        (..., d, n) in the dtype of X.

    Raises:
        TypeError: X is not a floating or complex tensor.
        ValueError: fewer than two dimensions, n ≤ correction, NaN or infinity, a covariance that is singular without ε
            or a policy (both read on the CPU by default); an unknown method, solver or policy, or ones that do not go
            together.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: two products of d × d by d × n and O(d³); with the factor, O(d n min(d, n)). ZCA and Cholesky
    differentiate to every order at any spectrum; PCA is differentiable only where the eigenvalues are simple (tied
    pairs contribute 0), and once.

    Example:
        >>> import torch
        >>> Y = whiten(torch.randn(3, 100), method="cholesky")
        >>> torch.allclose(torch.cov(Y, correction=0), torch.eye(3), atol=1e-5)
        True
    """
    require_options(method, eps, rank, solver)
    require_features(X, correction)
    by_factor = _goes_by_factor(X, via, method, eps, rank, solver)
    if X.numel() == 0:
        return X.clone()
    with full_precision(X):
        # The features themselves are asked for their rank only without a ridge, and in double precision.
        A = centred_factor(widened(X) if by_factor and eps == 0.0 else X, correction)
        root_n = (X.shape[-1] - correction) ** 0.5
        A = _without_constants(X, A, root_n)
        scale: Tensor | float = 1.0
        if relative or eps == 0.0:
            # Nothing changes when the features are scaled, so any scale will do that keeps P in the range of the dtype.
            largest = torch.linalg.vector_norm(A.detach(), float("inf"), dim=(-2, -1), keepdim=True)
            scale = positive_or_one(largest)
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
    """Whether the covariance is not formed; refuses what cannot do without it."""
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
    # The rank of the features is theirs to say: of a constant, P shows the rounding of the mean.
    few = rank == "pinv" or (2 * X.shape[-1] <= X.shape[-2] and eps > 0.0 and not in_onnx_export())
    return via == "auto" and few and method == "zca" and all(fits for _, fits in taken.values())


def _without_constants(X: Tensor, A: Tensor, root_n: float) -> Tensor:
    """A with 0 for the channels whose variance is less than (eps·mean)², which is the rounding of their samples.

    Of a constant the rounded mean leaves a difference, the same everywhere, which is no variance either.
    """
    rows = A.detach()
    reads = readable(X)
    if reads and rows.shape[:-1].numel() <= FEW_ROWS and not _near_a_constant(X.detach(), rows, root_n):
        return A
    mean = (X[..., :1].detach() - rows[..., :1] * root_n).abs()
    rounding = torch.finfo(working_dtype(X.dtype)).eps * mean
    # With that difference, at most some ten times the rounding, and at half the cost of the deviation.
    if reads and not (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) <= 16 * rounding).any():
        return A
    unit = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True)  # squares of tiny ones would vanish
    deviation = (rows / unit).std(-1, correction=0, keepdim=True) * unit * root_n  # NaN of zeros, which stay
    return A.masked_fill(deviation < rounding, 0.0)


def _near_a_constant(X: Tensor, rows: Tensor, root_n: float) -> bool:
    """Whether some channel may be one, by a bound on its mean and in as few operations as it takes to read them."""
    eps = torch.finfo(working_dtype(X.dtype)).eps
    sizes, first = torch.linalg.vector_norm(rows, dim=-1).flatten().tolist(), X[..., 0].flatten().tolist()
    # |mean| is at most the first sample and its deviation, which is below the norm of all.
    return not all(size > 16 * eps * (abs(x) + root_n * size) for size, x in zip(sizes, first, strict=True))
