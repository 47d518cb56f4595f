"""Rigid alignment of two point sets: the rotation and translation of weighted least squares, differentiable.

With H = Σ w (y − ȳ)(x − x̄)ᵀ = U Σ Vᵀ the rotation is R = U diag(1, …, 1, s) Vᵀ, s = det(U Vᵀ) (Kabsch 1976; Umeyama,
PAMI 1991). It is the factor in H = R S with S = V diag(σ1, …, s σd) Vᵀ symmetric, a polar factor with one sign turned,
so that its derivative is R Ω with Ω S + S Ω = Rᵀ dH − dHᵀ R: it divides by sums σi + σj and, in a reflection, by
σi − σd, never by differences σi² − σj² as the derivative of the singular vectors does. Repeated singular values are
harmless. The equation is solved among the skew-symmetric matrices, where one σ = 0 is harmless too; where the best
rotation is not unique, the directions that leave it free get the derivative 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.precision import full_precision, working_dtype
from wellcond.linalg import NonFiniteMatrixError, powm


def rigid_align(source: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rotation R and translation t that minimise Σ w ‖R x + t − y‖²: ``target ≈ source @ R.mT + t``.

    Args:
        source, target: (..., n, d) corresponding points x and y; batches broadcast. Half precision is computed in
            float32.
        weights: (..., n) w ≥ 0, not all zero; only their ratios matter. ``None`` for equal ones.

    Returns:
        R (..., d, d), d ≥ 2, with det R = +1, also where a reflection would fit better, and t (..., d); both in the
        dtype of source.

    Raises:
        ValueError: shapes that do not fit; NaN or infinity (read on the CPU).

    Complexity: O(n d² + d⁶) per pair. Points and weights are differentiable twice, where R is unique: points not on a
    line (for d = 3), and no tie between the two smallest singular values where det(U Vᵀ) = −1.
    Source: Kabsch 1976; Umeyama 1991; the derivative of the polar factor, Higham 2008, ch. 8.

    Example:
        >>> import torch
        >>> x = torch.randn(10, 3)
        >>> turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> R, t = rigid_align(x, x @ turn.T + 5)
        >>> torch.allclose(R, turn, atol=1e-5), torch.allclose(t, torch.full((3,), 5.0), atol=1e-4)
        (True, True)
    """
    _require_points(source, target, weights)
    dtype = source.dtype
    with full_precision(source):
        work = working_dtype(torch.promote_types(dtype, target.dtype))
        x, y = source.to(work), target.to(work)
        w = x.new_ones(x.shape[:-1]) if weights is None else weights.to(work)
        total = w.sum(-1, keepdim=True)
        w = (w / torch.where(total > 0, total, 1.0)).unsqueeze(-1)
        x_mean, y_mean = (w * x).sum(-2, keepdim=True), (w * y).sum(-2, keepdim=True)
        R = _nearest_rotation(_unit_sized(y - y_mean, w).mT @ (w * _unit_sized(x - x_mean, w)))
        t = (y_mean - x_mean @ R.mT).squeeze(-2)
        return R.to(dtype), t.to(dtype)


def _unit_sized(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """The points times a number, so that the largest coordinate of those with a weight is ±1. No rotation depends on
    it, and no derivative."""
    if not points.numel():
        return points
    size = points.detach().abs()
    size = (size if weights is None else torch.where(weights == 0, 0.0, size)).amax((-2, -1), keepdim=True)
    return points / torch.where(size > 0, size, 1.0)


def _nearest_rotation(H: Tensor) -> Tensor:
    """The rotation R that maximises tr(Rᵀ H)."""
    if readable(H) and not H.isfinite().all():
        raise NonFiniteMatrixError("source, target or weights hold NaN or infinite entries")
    H = _unit_sized(H)
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(H.detach())
        sign = torch.linalg.det(U @ Vh).sign()
        R = torch.cat([U[..., :-1], U[..., -1:] * sign[..., None, None]], -1) @ Vh
    # Newton's steps at the solution leave the value and give the derivatives: the first one of order 1, the second one
    # of order 2 as well.
    for _ in range(2):
        B = R.mT @ H
        R = R @ torch.linalg.matrix_exp(_skew_solution((B + B.mT) / 2, B - B.mT))
    return R


def _skew_solution(S: Tensor, G: Tensor) -> Tensor:
    """Skew Ω with Ω S + S Ω = G for skew G and symmetric S whose eigenvalues have no negative sum of two."""
    d = S.shape[-1]
    rows, columns = torch.triu_indices(d, d, offset=1, device=S.device)
    basis = S.new_zeros(len(rows), d, d)
    count = torch.arange(len(rows), device=S.device)
    basis[count, rows, columns], basis[count, columns, rows] = 1.0, -1.0
    # Its eigenvalues are 2 (si + sj), i < j.
    M = 2 * torch.einsum("lab,kac,...cb->...lk", basis, basis, S)
    right = torch.einsum("lab,...ab->...l", basis, G)
    omega = powm(M, -1.0, rank="pinv") @ right.unsqueeze(-1)
    return torch.einsum("kab,...k->...ab", basis, omega.squeeze(-1))


def _require_points(source: Tensor, target: Tensor, weights: Tensor | None) -> None:
    for name, points in (("source", source), ("target", target)):
        if points.ndim < 2 or not points.is_floating_point():
            raise ValueError(f"{name} must be floating points (..., n, d), got {points.dtype} {tuple(points.shape)}")
    shapes = f"got {tuple(source.shape)} and {tuple(target.shape)}"
    if source.shape[-1] < 2:
        raise ValueError(f"a rotation needs points of at least 2 dimensions, {shapes}")
    if source.shape[-2:] != target.shape[-2:]:
        raise ValueError(f"source and target must hold the same number of corresponding points, {shapes}")
    if weights is not None and weights.shape[-1:] != source.shape[-2:-1]:
        raise ValueError(f"weights must be (..., {source.shape[-2]}), got {tuple(weights.shape)}")
