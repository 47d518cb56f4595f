"""An orthogonal convolution: the exponential of a skew-symmetric one (Singla and Feizi, SOC, ICML 2021).

With [Mᵀ]_{ij,kl} = M_{ji,−k,−l} the kernel of the transposed convolution, L = M − Mᵀ is skew-symmetric as a linear map
J, for circular padding and for zero padding alike, and exp(J) = Σ J^k/k! is orthogonal. The series is never a kernel:
it is applied to the features, x + L∗x + L∗L∗x/2 + …. Cut after the power K it is off by at most ‖J‖^{K+1}/(K+1)! (as
SOC proves: the remainder of the exponential at an imaginary argument is no larger than its first term), so L is scaled
down where the four-way bound of ‖J‖ says that it might exceed ``max_norm``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond._shared.checks import refuse_by_tracing_to_onnx
from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import has_values, is_compiling, under_functorch

from ._base import require_input, symbolic_call
from ._derived import Derived
from ._operator_norm import skew_convolution_norm_bound


def truncation_error(norm: float, terms: int) -> float:
    """The largest distance of the series cut after the power ``terms`` from the exponential: norm^{K+1}/(K+1)!."""
    return norm ** (terms + 1) / math.factorial(terms + 1)


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
        terms: int = 5,
        max_norm: float = 1.5,
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
        c = max(in_channels * stride**2, out_channels)
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
            self.weight.normal_()
            bound = skew_convolution_norm_bound(self._skew_kernel())
            # One channel with a 1 × 1 kernel has no skew part at all.
            self.weight.mul_(torch.where(bound > 0, self.max_norm / bound, 1.0))
            if self.bias is not None:
                self.bias.zero_()

    def kernel(self) -> Tensor:
        """The skew-symmetric kernel L (c, c, kh, kw), scaled to ‖J‖ ≤ ``max_norm``; float32 or better.

        In evaluation without gradients it is kept until the weight changes.
        """
        weight = self.weight
        differentiated = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        if differentiated or is_compiling() or under_functorch() or not has_values(weight):
            return self._computed_kernel(weight)
        return self._kept.of((weight,), self.max_norm, self._computed_kernel)

    def _computed_kernel(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            L = self._skew_kernel()
            bound = skew_convolution_norm_bound(L)
            return L * (self.max_norm / bound.clamp_min(self.max_norm))

    def _skew_kernel(self) -> Tensor:
        """M − Mᵀ, the transpose as a convolution."""
        M = self.weight.to(working_dtype(self.weight.dtype))
        return M - M.transpose(0, 1).flip(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        if (node := symbolic_call(self, x)) is not None:
            return node
        require_input(x, (4,), self.in_channels)
        refuse_by_tracing_to_onnx("SkewOrthogonalConv2d")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"expected a size divisible by stride={self.stride} (got {tuple(x.shape[2:])})")
        c = self.weight.shape[0]
        x = F.pixel_unshuffle(x, self.stride) if self.stride > 1 else x
        x = F.pad(x, (0, 0, 0, 0, 0, c - x.shape[1])) if x.shape[1] < c else x
        L = self.kernel().to(x.dtype)
        total = power = x
        terms = self.terms
        while not self.training and truncation_error(self.max_norm, terms) > torch.finfo(x.dtype).eps:
            terms += 1
        for k in range(1, terms + 1):
            power = self._convolve(power, L / k)
            total = total + power
        total = total[:, : self.out_channels]
        return total if self.bias is None else total + self.bias.to(total.dtype).view(-1, 1, 1)

    def _convolve(self, x: Tensor, L: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, L, padding=self.padding)
        rows, columns = self.padding
        return F.conv2d(F.pad(x, (columns, columns, rows, rows), mode="circular"), L)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}, terms={self.terms}, "
            f"max_norm={self.max_norm}"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
