"""The whitening and colouring transform: content features with the mean and covariance of style features.

y = C W (x − μ_c) + μ_s with W P_c Wᵀ = I of the content and C Cᵀ = P_s of the style (Li et al., Universal Style
Transfer via Feature Transforms, NeurIPS 2017). ZCA takes the symmetric W = (P_c + εI)^{-1/2} and C = P_s^{1/2};
Cholesky the triangular W = L_c^{-1} and C = L_s, whose product is triangular and the identity where the two covariances
are equal.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from wellcond._shared.torch_internals import under_functorch
from wellcond.linalg import NonFiniteMatrixError, NotPositiveSemidefiniteError, covariance_sqrtm, invsqrtm

Method = Literal["zca", "cholesky"]


class Factor(NamedTuple):
    """Mean (..., d, 1) of the chosen samples, A (..., d, n) of zero mean with P = A Aᵀ, and √n of the chosen ones."""

    mean: Tensor
    A: Tensor
    root_n: Tensor | float


def whitening_coloring(
    content: Tensor,
    style: Tensor,
    *,
    eps: float,
    alpha: float = 1.0,
    method: Method = "zca",
    groups: int = 1,
    relative: bool = False,
    content_mask: Tensor | None = None,
    style_mask: Tensor | None = None,
) -> Tensor:
    """Give ``content`` the mean and covariance of ``style``, blended: α (C W (x − μ_c) + μ_s) + (1 − α) x.

    With ε = 0 ("zca") the covariance of the result at α = 1 is P_s^{1/2} Π P_s^{1/2}, where Π projects on the range of
    the content's covariance: that of the style exactly where the content has full rank. With fewer content samples
    than channels its eigenvalues are those of the style on the content's range, Π P_s Π. An ε > 0 changes it by at most
    ε/(λ + ε) of the largest eigenvalue of P_s, λ the least nonzero eigenvalue of P_c. With "cholesky" P_s + εI takes
    the place of P_s. A style of any rank is matched; its gradient through P_s^{1/2} is bounded.

    Args:
        content, style: (N, C, *spatial) or (C, n); the channels agree, the spatial sizes need not, and a batch of 1
            serves every image of the other. Half precision is computed in float32; the style is taken to the dtype of
            the content.
        eps: ε ≥ 0, added to the eigenvalues of the content's covariance before the inverse root ("cholesky": of both
            covariances). With 0, "zca" whitens on the range alone, in float64.
        alpha: α in [0, 1]: 0 gives the content, 1 the full transform.
        method: ``"zca"`` or ``"cholesky"``.
        groups: transform channels in this many groups, each by itself.
        relative: take ε in units of the mean eigenvalue, so that the scale of the features does not matter.
        content_mask, style_mask: boolean (N, *spatial) or (n,); the statistics are those of the chosen positions, and
            content elsewhere is returned as it is.

    Returns:
        The shape and dtype of ``content`` (of the larger batch).

    Raises:
        ValueError: shapes that do not fit, an unknown method, ε < 0, α outside [0, 1], groups not dividing C; a mask
            that chooses nothing, NaN or infinity, a singular covariance for Cholesky (read on the CPU by default).

    Complexity: O(C² n/groups) for statistics and result, O(C³/groups²) for the decompositions.

    Example:
        >>> import torch
        >>> from wellcond.linalg import covariance
        >>> content, style = torch.randn(1, 3, 32, 32), 2 + torch.rand(1, 3, 20, 24)
        >>> y = whitening_coloring(content, style, eps=1e-6)
        >>> torch.allclose(covariance(y.flatten(2)), covariance(style.flatten(2)), atol=1e-4)
        True
    """
    require_options(eps, alpha, method, groups)
    _require_fitting(content, style, groups)
    with torch.autocast(content.device.type, enabled=False):
        c, c_mask = grouped(content, groups), flat_mask(content_mask, content, "content_mask")
        s, s_mask = grouped(style.to(c.dtype), groups), flat_mask(style_mask, style, "style_mask")
        of_content, of_style = factor(c, c_mask, relative), factor(s, s_mask, False)
        if method == "zca":
            white, colour = _range_whitened(of_content.A, eps), _root(of_style.A)
        else:
            white, colour = _triangular_whitened(of_content.A, eps), _cholesky(of_style.A, eps, relative)
        y = (colour * of_content.root_n) @ white + of_style.mean
        y = torch.lerp(c.expand_as(y), y, alpha) if alpha < 1.0 else y
        if c_mask is not None:
            y = torch.where(c_mask, y, c)
        return y.reshape(*y.shape[:-3], *content.shape[y.ndim - 3 :]).to(content.dtype)


def require_options(eps: float, alpha: float, method: str, groups: int) -> None:
    """Refuse values that no content and style could go with."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")


def grouped(x: Tensor, groups: int) -> Tensor:
    """(N, groups, C/groups, n) of (N, C, *spatial), without N of (C, n); in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = 1 if x.ndim > 2 else 0
    return x.flatten(channels + 1).unflatten(channels, (groups, -1))


def factor(x: Tensor, mask: Tensor | None, relative: bool) -> Factor:
    """Mean and factor of features (..., d, n) under a mask (..., 1, n), A in units of its size if ``relative``."""
    if mask is None:
        root_n: Tensor | float = x.shape[-1] ** 0.5
        mean = x.mean(-1, keepdim=True)
        A = (x - mean) / root_n
    else:
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        root_n = count.to(x.dtype).sqrt()
        mean = torch.where(mask, x, 0.0).sum(-1, keepdim=True) / count
        A = torch.where(mask, x - mean, 0.0) / root_n
    return Factor(mean, A / _size(A).sqrt() if relative else A, root_n)


def _size(A: Tensor) -> Tensor:
    """The mean eigenvalue tr P/d as (..., 1, 1); 1 for a zero matrix."""
    size = A.square().sum((-2, -1), keepdim=True) / A.shape[-2]
    return torch.where(size > 0, size, 1.0)


def _range_whitened(A: Tensor, eps: float) -> Tensor:
    """(P + εI)^{-1/2} A; with ε = 0 on the range of P."""
    if eps > 0.0:
        return invsqrtm(A @ A.mT, eps=eps) @ A
    # In float64 the rounding of P = A Aᵀ lies below that of float32 features, so the rank is theirs.
    wide = A.double()
    return (invsqrtm(wide @ wide.mT, rank="pinv") @ wide).to(A.dtype)


def _root(A: Tensor) -> Tensor:
    """P^{1/2} by the factor form, which divides by the number of columns once more."""
    return covariance_sqrtm(A * A.shape[-1] ** 0.5)


def _triangular_whitened(A: Tensor, eps: float) -> Tensor:
    """L⁻¹ A with L Lᵀ = P + εI."""
    return torch.linalg.solve_triangular(_cholesky(A, eps, False), A, upper=False)


def _cholesky(A: Tensor, eps: float, relative: bool) -> Tensor:
    """The lower triangular factor of P + εI."""
    P = A @ A.mT
    ridge = eps * _size(A) if relative else eps
    try:
        return torch.linalg.cholesky(P + ridge * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    except torch.linalg.LinAlgError as error:
        if not P.isfinite().all():
            raise NonFiniteMatrixError(f"features of shape {tuple(A.shape)} hold NaN or infinite entries") from error
        raise NotPositiveSemidefiniteError(
            f"a covariance of {A.shape[-2]} channels over at most {A.shape[-1]} samples is singular up to rounding "
            f"with eps={eps}: it has no Cholesky factor; give a larger eps, or method='zca'"
        ) from error


def flat_mask(mask: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """(N, 1, 1, n) or (1, 1, n), to stand beside the grouped features."""
    if mask is None:
        return None
    expected = x.shape[-1:] if x.ndim == 2 else (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(expected):
        raise ValueError(
            f"{name} must be boolean of shape {tuple(expected)} for features of shape {tuple(x.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    flat = mask.reshape(1, 1, -1) if x.ndim == 2 else mask.reshape(x.shape[0], 1, 1, -1)
    if mask.device.type == "cpu" and not under_functorch() and not flat.any(-1).all():
        raise ValueError(f"{name} chooses no position in some image; leave that image out")
    return flat


def _require_fitting(content: Tensor, style: Tensor, groups: int) -> None:
    for name, x in (("content", content), ("style", style)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(f"{name} must be (N, C, *spatial) or (C, n), got shape {tuple(x.shape)}")
    if (content.ndim == 2) != (style.ndim == 2):
        raise ValueError(
            f"content and style must both be batched or neither, got {tuple(content.shape)} and {tuple(style.shape)}"
        )
    channels = [x.shape[1 if x.ndim > 2 else 0] for x in (content, style)]
    if channels[0] != channels[1]:
        raise ValueError(f"content and style must have the same channels, got {channels[0]} and {channels[1]}")
    if channels[0] % groups:
        raise ValueError(f"channels must be divisible by groups, got {channels[0]} channels and groups={groups}")
    if content.ndim > 2 and content.shape[0] != style.shape[0] and 1 not in (content.shape[0], style.shape[0]):
        raise ValueError(f"batches of {content.shape[0]} and {style.shape[0]} do not broadcast")
