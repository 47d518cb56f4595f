"""Global covariance pooling: a function of the covariance of a feature map, instead of its mean.

Li et al., MPN-COV (ICCV 2017) and iSQRT-COV (CVPR 2018); over the tokens of a vision transformer, Xie et al., So-ViT
(2021). The covariance of an h × w map has rank at most h·w − 1, usually far below its size; the factor form keeps the
gradient bounded there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wellcond.linalg import Solver

from ._normalise import Normalisation
from .spectral_layer import SpectralLayer


class _CovariancePool(nn.Module):
    """What the heads share: features (N, d, n) to a matrix function of their covariance, as matrix or vector."""

    upper: Tensor | None
    diagonal: Tensor | None

    def __init__(
        self,
        channels: int,
        function: str | Callable[[Tensor], Tensor],
        triu: bool,
        eps: float,
        solver: str | Solver,
        exponent: float | None,
        normalisation: Normalisation | None,
        isometric: bool,
    ) -> None:
        super().__init__()
        if isometric and not triu:
            raise ValueError("isometric=True scales the upper triangle, so it needs triu=True")
        d = channels
        self.triu, self.isometric = triu, isometric
        self.spectral = SpectralLayer(function, eps=eps, solver=solver, exponent=exponent, normalisation=normalisation)
        self.out_features = d * (d + 1) // 2 if triu else d * d
        rows, columns = torch.triu_indices(d, d)
        self.register_buffer("upper", rows * d + columns if triu else None, persistent=False)
        self.register_buffer("diagonal", rows == columns if isometric else None, persistent=False)

    def _pool(self, features: Tensor) -> Tensor:
        Q = self.spectral(features)
        if self.upper is None:
            return Q
        # index_select, not Q[:, upper]: the backward of the latter sorts its indices, and takes five times as long.
        packed = Q.flatten(1).index_select(1, self.upper)
        return packed if self.diagonal is None else torch.where(self.diagonal, packed, 2.0**0.5 * packed)

    def _options(self) -> str:
        isometric = ", isometric=True" if self.isometric else ""
        return f"triu={self.triu}{isometric}, out_features={self.out_features}"


class GlobalCovariancePool2d(_CovariancePool):
    """A head that pools a feature map to (a function of) its channel covariance.

    Args:
        in_channels: C of the incoming map.
        reduction: first reduce to this many channels by a 1 × 1 convolution, batch norm and ReLU (MPN-COV's
            dimension reduction; its convolution is then the pre-spectral layer). ``None`` for none.
        function: of the covariance, as in :class:`SpectralLayer`: ``"sqrt"``, ``"log"``, ``"power"``, ``"invsqrt"``,
            ``"exp"``, or a callable on matrices.
        triu: give the upper triangle as a vector, d(d + 1)/2 numbers, instead of the d × d matrix.
        eps, solver, exponent: as in :class:`SpectralLayer`. The logarithm of a map with fewer positions than channels
            needs ε > 0.
        normalisation: ``"trace"`` or ``"frobenius"``: f(P/tr P) or f(P/‖P‖_F), the same for features of any scale;
            ``None`` for f(P). As in :class:`SpectralLayer`.
        isometric: multiply the off-diagonal entries of the upper triangle by √2, so that inner products and distances
            of the vectors are those of the matrices.

    Shape: (N, C, H, W) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C. The dtype is
    kept; half precision and autocast are computed in float32.

    Attributes:
        out_features: numbers per image: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or channels, an unknown function or normalisation, ``isometric`` without ``triu``;
            what :class:`SpectralLayer` raises.

    Complexity: O(d n min(d, n)) per image with n = H·W; no n × n centring matrix is formed.

    Example:
        >>> import torch
        >>> pool = GlobalCovariancePool2d(64, reduction=8)
        >>> pool(torch.randn(2, 64, 7, 7)).shape, pool.out_features
        (torch.Size([2, 36]), 36)
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int | None = None,
        function: str | Callable[[Tensor], Tensor] = "sqrt",
        triu: bool = True,
        eps: float = 0.0,
        solver: str | Solver = "auto",
        *,
        exponent: float | None = None,
        normalisation: Normalisation | None = None,
        isometric: bool = False,
    ) -> None:
        d = _reduced(in_channels, reduction, "in_channels")
        super().__init__(d, function, triu, eps, solver, exponent, normalisation, isometric)
        self.in_channels = in_channels
        self.reduction = (
            nn.Sequential(nn.Conv2d(in_channels, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True))
            if reduction
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected input with {self.in_channels} channels (got {x.shape[1]} channels)")
        return self._pool(self.reduction(x).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self._options()}"


class TokenCovariancePool(_CovariancePool):
    """:class:`GlobalCovariancePool2d` over the tokens of a transformer.

    Args:
        in_features: C of the tokens.
        reduction: first map every token to this many features by a linear layer (the pre-spectral layer then); without
            bias, which centring would remove. ``None`` for none.
        function, triu, eps, solver, exponent, normalisation, isometric: as in :class:`GlobalCovariancePool2d`.

    Shape: (N, T, C) to (N, ``out_features``), or (N, d, d) with ``triu=False``; the covariance is over the T tokens, of
    which a class token is best left out.

    Attributes:
        out_features: numbers per sequence: d(d + 1)/2, or d².

    Raises, complexity: as :class:`GlobalCovariancePool2d`, with n = T. Source: Xie et al., So-ViT, 2021.

    Example:
        >>> import torch
        >>> pool = TokenCovariancePool(192, reduction=16)
        >>> pool(torch.randn(2, 196, 192)).shape
        torch.Size([2, 136])
    """

    def __init__(
        self,
        in_features: int,
        reduction: int | None = None,
        function: str | Callable[[Tensor], Tensor] = "sqrt",
        triu: bool = True,
        eps: float = 0.0,
        solver: str | Solver = "auto",
        *,
        exponent: float | None = None,
        normalisation: Normalisation | None = None,
        isometric: bool = False,
    ) -> None:
        d = _reduced(in_features, reduction, "in_features")
        super().__init__(d, function, triu, eps, solver, exponent, normalisation, isometric)
        self.in_features = in_features
        self.reduction = nn.Linear(in_features, d, bias=False) if reduction else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"expected 3D input (got {x.dim()}D input)")
        if x.shape[2] != self.in_features:
            raise ValueError(f"expected tokens with {self.in_features} features (got {x.shape[2]} features)")
        return self._pool(self.reduction(x).transpose(1, 2))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self._options()}"


def _reduced(width: int, reduction: int | None, name: str) -> int:
    if width < 1 or (reduction is not None and reduction < 1):
        raise ValueError(f"{name} and reduction must be positive, got {width} and {reduction}")
    return width if reduction is None else reduction
