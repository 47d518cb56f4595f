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

from wellcond._shared.checks import readable, refuse_in_onnx, require_finite, require_nonnegative
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, working_dtype
from wellcond.linalg import NotPositiveSemidefiniteError, covariance, covariance_sqrtm, whiten

from .._centred import centred, mean_of_samples

Method = Literal["zca", "cholesky"]


class Samples(NamedTuple):
    """The selected positions of an image, and their statistics.

    Attributes:
        x: (N, groups, C/groups, n), without N for one image; in float32 or better.
        mask: (N, 1, 1, n), likewise, or None where all positions are chosen.
        mean: (..., C/groups, 1) of the chosen ones.
        features: like x, and with their covariance: ``stretch`` · (x − mean) at the chosen positions and 0 elsewhere,
            and in constant channels.
        stretch: √(n/number of them).
    """

    x: Tensor
    mask: Tensor | None
    mean: Tensor
    features: Tensor
    stretch: Tensor | float


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
    ε/(λ + ε) of the largest eigenvalue of P_s, λ the smallest nonzero eigenvalue of P_c. With "cholesky" P_s + εI takes
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
    Source: Li et al., Universal Style Transfer via Feature Transforms, NeurIPS 2017.

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
    with full_precision(content):
        c = samples(content, content_mask, groups, "content_mask")
        s = samples(style.to(c.x.dtype), style_mask, groups, "style_mask")
        colour = _cholesky(s.features, eps, relative) if method == "cholesky" else covariance_sqrtm(s.features)
        if eps > 0.0 or method == "cholesky":
            white = whiten(c.features, eps=eps, method=method, relative=relative)
        else:
            # In float64 the rounding of P lies below that of float32 features, so the rank is theirs.
            white = whiten(c.features.double(), rank="pinv", via="covariance").to(c.x.dtype)
        y = (colour / c.stretch) @ white + s.mean
        y = torch.lerp(c.x.expand_as(y), y, alpha) if alpha < 1.0 else y
        if c.mask is not None:
            y = torch.where(c.mask, y, c.x)
        return y.reshape(*y.shape[:-3], *content.shape[y.ndim - 3 :]).to(content.dtype)


def require_options(eps: float, alpha: float, method: str, groups: int) -> None:
    """Raise for options that are invalid for any content and style."""
    require_known(method, get_args(Method), "method")
    if method == "cholesky":
        refuse_in_onnx("Cholesky decomposition")
    require_nonnegative(eps, "eps")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")


def samples(image: Tensor, mask: Tensor | None, groups: int, name: str) -> Samples:
    """The positions of (N, C, *spatial) or (C, n) that a mask of this name chooses; all without one."""
    batched = image.ndim > 2
    x = image.to(working_dtype(image.dtype)).flatten(1 + batched).unflatten(int(batched), (groups, -1))
    if mask is None:
        mean = mean_of_samples(x)
        return Samples(x, None, mean, centred(x, mean), 1.0)
    expected = (image.shape[0], *image.shape[2:]) if batched else image.shape[-1:]
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"{name} must be boolean of shape {tuple(expected)} for features of shape {tuple(image.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    mask = mask.reshape(*mask.shape[:batched], 1, 1, -1)
    if readable(mask) and not mask.any(-1).all():
        raise ValueError(f"{name} chooses no position in some image; leave that image out")
    stretch = (x.shape[-1] / mask.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)).sqrt()
    mean = mean_of_samples(x, mask)
    return Samples(x, mask, mean, centred(x, mean, mask) * stretch, stretch)


def mean_eigenvalue(features: Tensor) -> Tensor:
    """tr P/d as (..., 1, 1); 1 for a zero matrix."""
    size = features.var(-1, correction=0, keepdim=True).mean(-2, keepdim=True)
    return torch.where(size > 0, size, 1.0)


def _cholesky(features: Tensor, eps: float, relative: bool) -> Tensor:
    """The lower triangular factor of P + εI. (From ``whitening_matrix`` it would come as the inverse of an inverse.)"""
    P = covariance(features)
    ridge = eps * mean_eigenvalue(features) if relative else eps
    factor, info = torch.linalg.cholesky_ex(P + ridge * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    if readable(P) and info.any():
        require_finite(features, "style")
        raise NotPositiveSemidefiniteError(
            f"the style's covariance of {P.shape[-1]} channels over at most {features.shape[-1]} samples is singular "
            f"up to rounding with eps={eps}: it has no Cholesky factor; give a larger eps, or method='zca'"
        )
    return factor


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
    channels, others = (x.shape[0 if x.ndim == 2 else 1] for x in (content, style))
    if channels != others:
        raise ValueError(f"content and style must have the same channels, got {channels} and {others}")
    if channels % groups:
        raise ValueError(f"channels must be divisible by groups, got {channels} channels and groups={groups}")
    if content.ndim > 2 and content.shape[0] != style.shape[0] and 1 not in (content.shape[0], style.shape[0]):
        raise ValueError(f"batches of {content.shape[0]} and {style.shape[0]} do not broadcast")
