"""Global covariance pooling: a function of the covariance of a feature map, instead of its mean.

Li et al., MPN-COV (ICCV 2017) and iSQRT-COV (CVPR 2018); over the tokens of a vision transformer, Xie et al., So-ViT
(2021). The covariance of an h × w map has rank at most h·w − 1, usually far below its size; the factor form keeps the
gradient bounded there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from wellcond._shared.torch_internals import run_in_python
from wellcond.linalg import Solver

from ._base import SpectralModule, naming_options_of, require_input
from ._upper_triangle import upper_triangle
from .spectral_layer import Normalisation, SpectralLayer

fx.wrap("upper_triangle")


class _CovariancePool(nn.Module):
    """What the heads share: features (N, d, n) to a matrix function of their covariance, as matrix or vector."""

    in_channels: int
    channels: int
    triu: bool
    isometric: bool
    out_features: int
    spectral: SpectralLayer
    reduction: nn.Module

    def __init__(
        self,
        in_channels: int,
        reduction: int | None = None,
        function: str | Callable[[Tensor], Tensor] = "sqrt",
        triu: bool = True,
        eps: float = 0.0,
        solver: str | Solver = "auto",
        *,
        exponent: float | torch.nn.Parameter | None = None,
        normalisation: Normalisation | None = None,
        isometric: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or (reduction is not None and reduction < 1):
            raise ValueError(f"the channels and reduction must be positive, got {in_channels} and {reduction}")
        if isometric and not triu:
            raise ValueError("isometric=True scales the upper triangle, so it needs triu=True")
        d = in_channels if reduction is None else reduction
        self.in_channels, self.channels, self.triu, self.isometric = in_channels, d, triu, isometric
        self.out_features = d * (d + 1) // 2 if triu else d * d
        self.spectral = SpectralLayer(function, eps=eps, solver=solver, exponent=exponent, normalisation=normalisation)
        self.reduction = self._reduction_to(d, device=device, dtype=dtype) if reduction else nn.Identity()

    def _reduction_to(self, channels: int, **kind: Any) -> nn.Module:
        """The layers before the covariance, with parameters of this device and dtype."""
        raise NotImplementedError

    def _pool(self, features: Tensor) -> Tensor:
        Q = self.spectral(features)
        return upper_triangle(Q, self.isometric) if self.triu else Q

    def extra_repr(self) -> str:
        isometric = ", isometric=True" if self.isometric else ""
        return f"{self.in_channels}, triu={self.triu}{isometric}, out_features={self.out_features}"


class _GridCovariancePool(_CovariancePool):
    """The head for feature maps (N, C, *spatial) with ``_dim`` spatial dimensions."""

    _dim: int

    def _reduction_to(self, channels: int, **kind: Any) -> nn.Module:
        convolution, norm = {
            1: (nn.Conv1d, nn.BatchNorm1d),
            2: (nn.Conv2d, nn.BatchNorm2d),
            3: (nn.Conv3d, nn.BatchNorm3d),
        }[self._dim]
        return nn.Sequential(
            convolution(self.in_channels, channels, 1, bias=False, **kind),
            norm(channels, **kind),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.spectral, SpectralModule) and self.spectral._breaks_graph():
            return run_in_python(_GridCovariancePool.forward, self, x)
        require_input(x, (self._dim + 2,), self.in_channels)
        return self._pool(self.reduction(x).flatten(2))


class GlobalCovariancePool1d(_GridCovariancePool):
    """A head that pools signals, channels × time, to (a function of) their channel covariance: of an EEG, say.

    Args:
        in_channels: C of the signals.
        reduction: first reduce to this many channels by a convolution of kernel 1, batch norm and ReLU. ``None`` for
            none.
        function, triu, eps, solver, exponent, normalisation, isometric, device, dtype: as in
            :class:`GlobalCovariancePool2d`.

    Shape: (N, C, L) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C. The dtype is
    kept; half precision and autocast are computed in float32.

    Attributes:
        out_features: numbers per signal: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or channels; an unknown function or normalisation; an exponent or a solver for a
            function that takes none; ``isometric`` without ``triu``; a covariance of which the function does not exist,
            NaN or infinity in the input (checked on the CPU by default).

    Complexity: O(d L min(d, L)) per signal. Source: Barachant et al., IEEE TBME 2012, for the logarithm of the
    covariance of an EEG.

    Example:
        >>> import torch
        >>> pool = GlobalCovariancePool1d(22, function="log", eps=1e-6, isometric=True)
        >>> pool(torch.randn(4, 22, 500)).shape
        torch.Size([4, 253])
    """

    _dim = 1


class GlobalCovariancePool2d(_GridCovariancePool):
    """A head that pools a feature map to (a function of) its channel covariance.

    Args:
        in_channels: C of the incoming map.
        reduction: first reduce to this many channels by a 1 × 1 convolution, batch norm and ReLU (MPN-COV's
            dimension reduction; its convolution is then the pre-spectral layer). ``None`` for none.
        function: of the covariance: ``"sqrt"``, ``"log"``, ``"power"``, ``"invsqrt"``, ``"exp"``, or a callable on
            matrices.
        triu: give the upper triangle as a vector, d(d + 1)/2 numbers, instead of the d × d matrix.
        eps: ε ≥ 0, added to the eigenvalues. The logarithm of a map with fewer positions than channels needs it
            positive.
        solver: of the two roots, a name or a solver object.
        exponent: of ``"power"``, any finite number; 1/2 if not given.
        normalisation: ``"trace"`` or ``"frobenius"``: f(P/tr P) or f(P/‖P‖_F), the same for features of any scale;
            ``None`` for f(P).
        isometric: multiply the off-diagonal entries of the upper triangle by √2, so that inner products and distances
            of the vectors are those of the matrices.
        device, dtype: of the reduction's parameters.

    Shape: (N, C, H, W) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C. The dtype is
    kept; half precision and autocast are computed in float32.

    Attributes:
        out_features: numbers per image: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or channels; an unknown function or normalisation; an exponent or a solver for a
            function that takes none; ``isometric`` without ``triu``; a covariance of which the function does not exist,
            NaN or infinity in the input (checked on the CPU by default).

    Complexity: O(d n min(d, n)) per image with n = H·W; no n × n centring matrix is formed. Source: Li et al., MPN-COV,
    ICCV 2017, and iSQRT-COV, CVPR 2018; Song, Sebe and Wang, ECCV 2022, sect. 6.2.

    Example:
        >>> import torch
        >>> pool = GlobalCovariancePool2d(64, reduction=8)
        >>> pool(torch.randn(2, 64, 7, 7)).shape, pool.out_features
        (torch.Size([2, 36]), 36)
    """

    _dim = 2


class GlobalCovariancePool3d(_GridCovariancePool):
    """A head that pools the feature maps of a clip to (a function of) their channel covariance over space and time.

    Args:
        in_channels: C of the maps.
        reduction: first reduce to this many channels by a 1 × 1 × 1 convolution, batch norm and ReLU. ``None`` for
            none.
        function, triu, eps, solver, exponent, normalisation, isometric, device, dtype: as in
            :class:`GlobalCovariancePool2d`.

    Shape: (N, C, D, H, W) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C. The dtype is
    kept; half precision and autocast are computed in float32.

    Attributes:
        out_features: numbers per clip: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or channels; an unknown function or normalisation; an exponent or a solver for a
            function that takes none; ``isometric`` without ``triu``; a covariance of which the function does not exist,
            NaN or infinity in the input (checked on the CPU by default).

    Complexity: O(d n min(d, n)) per clip with n = D·H·W; no n × n centring matrix is formed. Source: temporal pooling
    of covariances, Gao et al., NeurIPS 2021.

    Example:
        >>> import torch
        >>> GlobalCovariancePool3d(16)(torch.randn(2, 16, 4, 7, 7)).shape
        torch.Size([2, 136])
    """

    _dim = 3


class TokenCovariancePool(_CovariancePool):
    """A head that pools the tokens of a transformer to (a function of) the covariance of their features.

    Args:
        in_features: C of the tokens.
        reduction: first map every token to this many features by a linear layer (the pre-spectral layer then); without
            bias, which centring would remove. ``None`` for none.
        function, triu, eps, solver, exponent, normalisation, isometric, device, dtype: as in
            :class:`GlobalCovariancePool2d`.

    Shape: (N, T, C) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C. The covariance is
    over the T tokens; leave a class token out. The dtype is kept; half precision and autocast are
    computed in float32.

    Attributes:
        out_features: numbers per sequence: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or features; an unknown function or normalisation; an exponent or a solver for a
            function that takes none; ``isometric`` without ``triu``; a covariance of which the function does not exist,
            NaN or infinity in the input (checked on the CPU by default).

    Complexity: O(d T min(d, T)) per sequence. Source: Xie et al., So-ViT, 2021.

    Example:
        >>> import torch
        >>> pool = TokenCovariancePool(192, reduction=16)
        >>> pool(torch.randn(2, 196, 192)).shape
        torch.Size([2, 136])
    """

    @naming_options_of(_CovariancePool)
    def __init__(self, in_features: int, *args: Any, **options: Any) -> None:
        super().__init__(in_features, *args, **options)
        self.in_features = in_features

    def _reduction_to(self, channels: int, **kind: Any) -> nn.Module:
        return nn.Linear(self.in_channels, channels, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.spectral, SpectralModule) and self.spectral._breaks_graph():
            return run_in_python(TokenCovariancePool.forward, self, x)
        if not isinstance(x, fx.Proxy):
            self._check_tokens(x)
        return self._pool(self.reduction(x).transpose(1, 2))

    def _check_tokens(self, x: Tensor) -> None:
        if x.dim() != 3:
            raise ValueError(f"expected 3D input (got {x.dim()}D input)")
        if x.shape[2] != self.in_features:
            raise ValueError(f"expected tokens with {self.in_features} features (got {x.shape[2]} features)")
