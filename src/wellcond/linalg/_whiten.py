"""Whitening features: a linear map of the centred samples whose covariance is the identity (up to ε).

ZCA takes (P + εI)^{-1/2}, the whitening nearest to the data; PCA the eigenvector coordinates Λ^{-1/2} Uᴴ; Cholesky
the inverse of the triangular factor. They differ by a rotation (Kessy, Lewin and Strimmer, The American Statistician,
2018).

From the features themselves, without forming P, κ(P) counts with its square root only. With the tall T = Aᴴ (or A where
there are fewer samples than channels) and B = [T; √ε I], BᴴB is the covariance on the smaller side plus ε. ZCA is the
polar factor of B, cut to the rows of T: (A Aᴴ + εI)^{-1/2} A = A (Aᴴ A + εI)^{-1/2}. Cholesky is the orthonormal factor
of a QR decomposition of B (Golub and Van Loan, Matrix Computations, 4th ed., sect. 5.3).
"""

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
    require_finite,
    require_matrix,
    require_nonnegative,
)
from wellcond._shared.errors import NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, widened, working_dtype
from wellcond._shared.products import identity, positive_or_one
from wellcond._shared.torch_internals import as_written, in_a_graph_that_breaks, in_onnx_export

from ._covariance import centred_factor, require_features
from ._divided_differences import reciprocal_or_zero
from ._polar import Polar
from ._rank import Rank, eigenpairs, feature_tolerance, matrix_tolerance, require_rank_policy
from ._roots import invsqrtm
from .solvers import Eigh, Solver, choose_solver

# Rows up to which Python looks at them faster than as many operations do.
FEW_ROWS = 64

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
    _require_options(method, eps, rank, solver)
    require_features(X, correction)
    if in_a_graph_that_breaks() and not (method == "zca" and choose_solver(solver).traceable):
        given = {"eps": eps, "method": method, "relative": relative, "rank": rank, "correction": correction}
        return as_written(whiten, X, **given, solver=solver, via=via)
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
            white = _white_factor(X, A, scale, method, eps, rank)
        else:
            if eps == 0.0 and rank == "ridge":
                _require_samples(A)
            white = _matrix(A @ A.mH, method, eps, rank, solver) @ A
        return (white * root_n).to(X.dtype)


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
        relative: take ε in units of the mean eigenvalue tr P/d.
        rank: as in :func:`invsqrtm`; ZCA only.
        solver: of the inverse root of ZCA, as in :func:`sqrtm`.

    Returns:
        (..., d, d) in the dtype of P: (P + εI)^{-1/2} for ``"zca"``, eigenvectors in rows by falling eigenvalue over
        the roots of their eigenvalues for ``"pca"``, lower triangular for ``"cholesky"``.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square, finite, Hermitian or positive definite (read on the CPU by default); an unknown
            method, solver or policy, or ones that do not go together.
        DecompositionError: every step of the fall-back chain failed.

    Complexity: O(d³) per matrix. ZCA and Cholesky differentiate to every order at any spectrum; PCA once, and only
    where the eigenvalues are simple (tied pairs contribute 0).

    Example:
        >>> import torch
        >>> whitening_matrix(torch.diag(torch.tensor([4.0, 16.0])), method="pca")
        tensor([[0.0000, 0.2500],
                [0.5000, 0.0000]])
    """
    _require_options(method, eps, rank, solver)
    require_matrix(P, "P", square=True)
    if P.shape[-1] == 0:
        return P.clone()
    with full_precision(P):
        work = P.to(working_dtype(P.dtype))
        if not relative:
            return _matrix(work, method, eps, rank, solver).to(P.dtype)
        scale = work.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
        scale = positive_or_one(scale)
        return (_matrix(work / scale, method, eps, rank, solver) / scale.sqrt()).to(P.dtype)


def _require_options(method: str, eps: float, rank: str, solver: str | Solver) -> None:
    """Refuse an unknown method, and options that the method would not use."""
    require_known(method, get_args(WhiteningMethod), "whitening method")
    require_nonnegative(eps, "eps")
    require_rank_policy(rank, eps)
    if method == "cholesky":
        refuse_in_onnx("Cholesky decomposition")
    if method != "zca" and rank != "ridge":
        raise ValueError(f"rank={rank!r} is for method='zca', not {method!r}")
    if not isinstance(choose_solver(solver), Eigh) and method == "cholesky":
        raise ValueError(f"method='cholesky' takes no solver, got {solver!r}")


def _matrix(P: Tensor, method: WhiteningMethod, eps: float, rank: Rank, solver: str | Solver) -> Tensor:
    if method != "cholesky":
        S = invsqrtm(P, eps=eps, rank=rank, solver=solver)
        return S if method == "zca" else _principal_axes(hermitian_part(P)).mH @ S
    P = hermitian(P) if readable(P) else hermitian_part(P)
    eye = identity(P)
    L, info = torch.linalg.cholesky_ex(torch.add(P, eye, alpha=eps) if eps else P)
    W = torch.linalg.solve_triangular(L, eye, upper=False)
    if readable(P):  # not under torch.func, where values are not read
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
    """(...,) whether the smallest eigenvalue of P is rounding, given P^{-1} = Wᴴ W.

    It is not below 1/tr P^{-1}; only where that does not settle it, the eigenvalues are computed.
    """
    bound = P.shape[-1] * torch.finfo(P.dtype).eps * P.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    if (bound * W.abs().square().sum((-2, -1)) < 1.0).all():
        return torch.zeros_like(bound, dtype=torch.bool)
    eigvals = torch.linalg.eigvalsh(P)
    return eigvals[..., 0] <= matrix_tolerance(eigvals).squeeze(-1)


def _principal_axes(P: Tensor) -> Tensor:
    """Eigenvectors in columns by falling eigenvalue, each with its largest entry positive.

    Their first derivative is dU = U (F ∘ (Uᴴ dP U)) with F_ij = 1/(λj − λi), and 0 for pairs tied up to rounding.
    """
    eigvals, U = eigenpairs(P)
    eigvals, U = eigvals.flip(-1), U.flip(-1)
    gap = eigvals.unsqueeze(-2) - eigvals.unsqueeze(-1)
    F = reciprocal_or_zero(torch.where(gap.abs() > matrix_tolerance(eigvals).unsqueeze(-1), gap, 0.0))
    inside = U.mH @ P @ U
    axes = U + U @ (F * (inside - inside.detach()))
    # The phase is a function of P too.
    top = axes.gather(-2, U.abs().argmax(-2, keepdim=True))
    return axes * (top.conj() / top.abs())


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


def _white_factor(
    X: Tensor, A: Tensor, scale: Tensor | float, method: WhiteningMethod, eps: float, rank: Rank
) -> Tensor:
    """The whitened A = (X − mean)/(√n · scale), without its covariance."""
    d, n = A.shape[-2:]
    sigma = floor = None
    if eps == 0.0:
        largest = X.detach().abs().amax((-2, -1), keepdim=True)
        unit = X.detach() / positive_or_one(largest)
        mean_square = torch.linalg.vector_norm(unit, dim=(-2, -1), dtype=A.dtype).real.square() / n
        floor = feature_tolerance(X, mean_square).sqrt() * (largest / scale)[..., 0, 0]
    if method == "cholesky":
        if readable(A):
            require_finite(A, "X")
        Q, R = torch.linalg.qr(_with_ridge(A.mH, eps))
        # LAPACK leaves the signs of the diagonal open.
        white = (Q[..., :n, :] * R.diagonal(dim1=-2, dim2=-1).detach().sgn().unsqueeze(-2)).mH
        if floor is not None and n > d and readable(R):
            sigma = torch.linalg.svdvals(R.detach())
    else:
        T = A if n < d else A.mH
        # A ridge leaves no singular value of B below √ε: nothing is cut then.
        cut = floor.unsqueeze(-1) if floor is not None and rank == "pinv" else None
        W, sigma, _ = Polar.call(_with_ridge(T, eps), 0.0, cut, "X")
        W = W[..., : T.shape[-2], :]
        white = W if n < d else W.mH
    if floor is not None and rank == "ridge":
        _require_full_rank(A, sigma, floor)
    return white


def _with_ridge(T: Tensor, eps: float) -> Tensor:
    if eps == 0.0:
        return T
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return torch.cat([T, (eps**0.5 * eye).expand(*T.shape[:-2], *eye.shape)], -2)


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


def _require_samples(A: Tensor) -> None:
    """Refuse too few samples for a covariance of full rank: centred features have at most n − 1 directions."""
    if A.shape[-1] <= A.shape[-2]:
        if readable(A):
            require_finite(A, "X")
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding{place()}: {A.shape[-1]} "
            f"samples span at most {A.shape[-1] - 1} directions; give eps > 0, or method='zca' with rank='pinv'"
        )


def _require_full_rank(A: Tensor, sigma: Tensor | None, floor: Tensor) -> None:
    """Refuse a covariance that is singular up to the rounding of the features."""
    _require_samples(A)
    if sigma is None or not readable(A):
        return
    singular = sigma.amin(-1) <= floor
    if singular.any():
        raise NotPositiveSemidefiniteError(
            f"X of shape {tuple(A.shape)} has a covariance that is singular up to rounding"
            f"{bad_indices(singular)}{place()}; give eps > 0, or method='zca' with rank='pinv'"
        )
