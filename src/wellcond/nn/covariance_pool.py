"""Global covariance pooling: the square root of the covariance of a feature map instead of its mean.

Li et al., MPN-COV (ICCV 2017) and iSQRT-COV (CVPR 2018). The covariance of an h × w map has rank at most h·w − 1,
usually far below its size; the factor form keeps the gradient bounded there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellcond.linalg import Solver

from .spectral_layer import SpectralLayer


class GlobalCovariancePool2d(nn.Module):
    """A head that pools a feature map to (a function of) its channel covariance.

    Args:
        in_channels: C of the incoming map.
        reduction: first reduce to this many channels by a 1 × 1 convolution, batch norm and ReLU (MPN-COV's
            dimension reduction; its convolution is then the pre-spectral layer). ``None`` for none.
        function: of the covariance, as in :class:`SpectralLayer`.
        triu: give the upper triangle as a vector, d(d + 1)/2 numbers, instead of the d × d matrix.
        eps, solver: as in :class:`SpectralLayer`.

    Shape: (N, C, H, W) to (N, ``out_features``), or (N, d, d) with ``triu=False``; d is reduction or C.

    Attributes:
        out_features: numbers per image: d(d + 1)/2, or d².

    Raises:
        ValueError: wrong dimensions or channels, unknown function; what :class:`SpectralLayer` raises.

    Complexity: O(d n min(d, n)) per image with n = H·W; no n × n centring matrix is formed.

    Example:
        >>> import torch
        >>> pool = GlobalCovariancePool2d(64, reduction=8)
        >>> pool(torch.randn(2, 64, 7, 7)).shape, pool.out_features
        (torch.Size([2, 36]), 36)
    """

    upper: Tensor | None

    def __init__(
        self,
        in_channels: int,
        reduction: int | None = None,
        function: str = "sqrt",
        triu: bool = True,
        eps: float = 0.0,
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__()
        if in_channels < 1 or (reduction is not None and reduction < 1):
            raise ValueError(f"in_channels and reduction must be positive, got {in_channels} and {reduction}")
        self.in_channels = in_channels
        d = reduction or in_channels
        self.reduction = (
            nn.Sequential(nn.Conv2d(in_channels, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True))
            if reduction
            else nn.Identity()
        )
        self.spectral = SpectralLayer(function, eps=eps, solver=solver)
        self.triu = triu
        self.out_features = d * (d + 1) // 2 if triu else d * d
        rows, columns = torch.triu_indices(d, d)
        self.register_buffer("upper", rows * d + columns if triu else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected input with {self.in_channels} channels (got {x.shape[1]} channels)")
        Q = self.spectral(self.reduction(x).flatten(2))
        return Q if self.upper is None else Q.flatten(1)[:, self.upper]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, triu={self.triu}, out_features={self.out_features}"
