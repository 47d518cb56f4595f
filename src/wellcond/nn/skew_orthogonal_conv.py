"""An orthogonal convolution: the exponential of a skew-symmetric one (Singla and Feizi, SOC, ICML 2021).

The mathematics is in ``wellcond._shared.skew_convolution``; the orthogonal weight of the map "soc" has it too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.checks import refuse_by_tracing_to_onnx
from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.names import require_known
from wellcond._shared.skew_convolution import (
    MAX_NORM,
    TERMS,
    at_the_bound,
    bounded_skew_kernel,
    exact_terms,
    skew_orthogonal_convolution,
    stored_channels,
)
from wellcond._shared.torch_internals import has_values, is_compiling, under_forward_mode, under_functorch

from ._base import require_input, symbolic_call
from ._derived import Derived


class SkewOrthogonalConv2d(SelfDescribing):
    """A 2-d convolution with an orthogonal Jacobian: it keeps the norm of its input, and of the gradient.

    Where channels and stride make the input larger than the output it is a projection after a rotation (JJᵀ = I); where
    they make it smaller, an embedding (JᵀJ = I); else both.

    Args:
        in_channels, out_channels: of the images; the smaller side is filled up with zero channels.
        kernel_size: odd, an integer or a pair. The receptive field is that of all powers in the series together.
        stride: s ≥ 1; s × s pixels become s² channels first (space to depth), so it must divide the size of the image.
        padding: ``"same"``, or the number that is (kernel_size − 1)/2; nothing else is skew-symmetric.
        bias: learn one number per output channel.
        padding_mode: ``"zeros"`` or ``"circular"``.
        terms: highest power K of the series in training; in evaluation it is as high as it takes for an error below the
            rounding of the input's dtype (12 in float32 at the default ``max_norm``).
        max_norm: bound of ‖J‖. The Jacobian's singular values are within max_norm^{K+1}/(K+1)! of 1 in training: at
            the defaults 0.016, at max_norm 1 and K = 5 0.0014. The rotation angles of the layer are at most max_norm.
        device, dtype: of the parameters; the kernel is computed in float32 or better.

    Shape: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        weight: M, (c, c, kh, kw) with c = max(in_channels·stride², out_channels).

    Raises:
        ValueError: an even kernel, another padding, wrong dimensions or channels, a size that stride does not divide.

    Complexity: K convolutions of c to c channels, and five products of c·kh × c·kw matrices for the bound of the norm
    (once, in evaluation).
    Source: Singla and Feizi, Skew Orthogonal Convolutions, ICML 2021.

    Example:
        >>> import torch
        >>> conv = SkewOrthogonalConv2d(4, 4, 3, bias=False).eval()
        >>> x = torch.randn(2, 4, 8, 8)
        >>> torch.allclose(conv(x).norm(), x.norm(), rtol=1e-5)
        True
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    padding_mode: str
    terms: int
    max_norm: float
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: str | int | tuple[int, int] = "same",
        *,
        bias: bool = True,
        padding_mode: str = "zeros",
        terms: int = TERMS,
        max_norm: float = MAX_NORM,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1 or stride < 1 or terms < 1 or not 0 < max_norm < math.inf:
            raise ValueError(
                "in_channels, out_channels, stride, terms and max_norm must be positive, got "
                f"{in_channels}, {out_channels}, {stride}, {terms} and {max_norm}"
            )
        kernel = _pair(kernel_size)
        if any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size must be odd for a skew-symmetric convolution, got {kernel_size}")
        same = (kernel[0] // 2, kernel[1] // 2)
        if padding != "same" and (isinstance(padding, str) or _pair(padding) != same):
            raise ValueError(f"padding must be 'same', which is {same} here, got {padding!r}")
        require_known(padding_mode, ("zeros", "circular"), "padding_mode")
        self.in_channels, self.out_channels, self.kernel_size, self.stride = in_channels, out_channels, kernel, stride
        self.padding, self.padding_mode, self.terms, self.max_norm = same, padding_mode, terms, max_norm
        c = stored_channels(in_channels, out_channels, stride)
        self.weight = nn.Parameter(torch.empty(c, c, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self._kept = Derived()
        self._say(device)
        self.reset_parameters()

    def meaning(self) -> dict[str, Any]:
        """What the saved M is scaled to; ``terms`` is an error bound of training, not another map."""
        return {"max_norm": self.max_norm}

    def reset_parameters(self) -> None:
        """M random and Gaussian, scaled so that L reaches the bound ``max_norm``; the bias 0."""
        with torch.no_grad():
            self.weight.copy_(at_the_bound(self.weight.normal_(), self.max_norm))
            if self.bias is not None:
                self.bias.zero_()

    def kernel(self) -> Tensor:
        """The skew-symmetric kernel L (c, c, kh, kw), scaled to ‖J‖ ≤ ``max_norm``; float32 or better.

        In evaluation without gradients it is kept until the weight changes.
        """
        weight = self.weight
        differentiated = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        differentiated = differentiated or under_functorch() or under_forward_mode()
        if differentiated or is_compiling() or not has_values(weight):
            return self._computed_kernel(weight)
        return self._kept.of((weight,), self.max_norm, self._computed_kernel)

    def _computed_kernel(self, weight: Tensor) -> Tensor:
        return bounded_skew_kernel(weight, self.max_norm)

    def forward(self, x: Tensor) -> Tensor:
        if (node := symbolic_call(self, x)) is not None:
            return node
        require_input(x, (4,), self.in_channels)
        refuse_by_tracing_to_onnx("SkewOrthogonalConv2d")
        total = skew_orthogonal_convolution(
            x,
            self.kernel(),
            out_channels=self.out_channels,
            stride=self.stride,
            terms=self.terms if self.training else exact_terms(self.max_norm, x.dtype, self.terms),
            padding_mode=self.padding_mode,
        )
        return total if self.bias is None else total + self.bias.to(total.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}, terms={self.terms}, "
            f"max_norm={self.max_norm}"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
