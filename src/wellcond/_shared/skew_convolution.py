"""The exponential of a skew-symmetric convolution (Singla and Feizi, SOC, ICML 2021) with a stored filter M.

Let [Mᵀ]_{ij,kl} = M_{ji,−k,−l} be the kernel of the transposed convolution. Then L = M − Mᵀ is skew-symmetric as a
linear map J, for circular and for zero padding, and exp(J) = Σ J^k/k! is orthogonal. The series is not expanded to a
kernel but applied to the features, x + L∗x + L∗L∗x/2 + …. Truncated after the power K its error is at most
‖J‖^{K+1}/(K+1)! (shown in SOC: at an imaginary argument the remainder of the exponential is at most its first term). So
L is scaled down where the four-way bound of ‖J‖ exceeds ``max_norm``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact_products import exact_products, exactly
from .operator_norm import skew_convolution_norm_bound, spectral_norm_bound
from .precision import full_precision, working_dtype

TERMS, MAX_NORM = 5, 1.5
"""The highest power of the series in training, and the bound of ‖J‖."""
SYMMETRIC = 0.1
"""The fraction of ‖M‖, M as a matrix (c, c·kh·kw), below which the bound of ‖J‖ is not scaled up to ``max_norm``."""


def truncation_error(norm: float, terms: int) -> float:
    """The largest error of the series truncated after the power K = ``terms``: norm^{K+1}/(K+1)!."""
    return norm ** (terms + 1) / math.factorial(terms + 1)


def exact_terms(max_norm: float, dtype: torch.dtype, terms: int) -> int:
    """The power, at least ``terms``, after which the truncated series is exact to the rounding of ``dtype``."""
    while truncation_error(max_norm, terms) > torch.finfo(dtype).eps:
        terms += 1
    return terms


def stored_channels(in_channels: int, out_channels: int, stride: int) -> int:
    """The c of a stored filter (c, c, kh, kw): a rotation has equally many input and output channels."""
    return max(in_channels * stride**2, out_channels)


def skew_kernel(M: Tensor) -> Tensor:
    """M − Mᵀ, with the transpose as a convolution; in float32 or better."""
    M = M.to(working_dtype(M.dtype))
    return M - M.transpose(0, 1).flip(-1, -2)


def bounded_skew_kernel(M: Tensor, max_norm: float) -> Tensor:
    """The kernel L (c, c, kh, kw), scaled to ‖J‖ ≤ ``max_norm``."""
    with full_precision(M):
        L = skew_kernel(M)
        return L * (max_norm / exactly(skew_convolution_norm_bound, L).clamp_min(max_norm))


def at_the_bound(M: Tensor, max_norm: float) -> Tensor:
    """M scaled so that the bound of ‖J‖ is ``max_norm``, the largest size that is not scaled down.

    The skew part of an almost symmetric M may be mere rounding: its bound stays below, in proportion to its share.
    """
    with full_precision(M), exact_products():
        bound = skew_convolution_norm_bound(skew_kernel(M))
        whole = spectral_norm_bound(M.to(bound.dtype).flatten(1))
        size = torch.maximum(bound, SYMMETRIC * whole).clamp_min(torch.finfo(bound.dtype).tiny)
        return (M * (max_norm / size)).to(M.dtype)


def skew_half(M: Tensor) -> Tensor:
    """(M − Mᵀ)/2, which has the same L as M, in float32 or better."""
    return skew_kernel(M) / 2


def skew_orthogonal_convolution(
    x: Tensor, L: Tensor, *, out_channels: int, stride: int, terms: int, padding_mode: str
) -> Tensor:
    """exp(J) x of x (N, in, H, W), as (N, out, H/stride, W/stride).

    Blocks of s × s pixels become s² channels; missing channels are zero.

    Raises:
        ValueError: ``stride`` does not divide the height or width.
    """
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(f"expected a size divisible by stride={stride} (got {tuple(x.shape[2:])})")
    if stride > 1:
        # pixel_unshuffle leaves the shape of an empty batch unchanged.
        coarse = (x.shape[0], x.shape[1] * stride**2, x.shape[2] // stride, x.shape[3] // stride)
        x = F.pixel_unshuffle(x, stride) if x.numel() else x.reshape(coarse)
    x = F.pad(x, (0, 0, 0, 0, 0, L.shape[0] - x.shape[1])) if x.shape[1] < L.shape[0] else x
    L = L.to(x.dtype)
    # Horner's rule: x + J(x + J/2 (x + J/3 (…))).
    y = x
    for k in range(terms, 0, -1):
        y = torch.add(x, _convolve(y, L, padding_mode), alpha=1 / k)
    return y[:, :out_channels]


def _convolve(x: Tensor, L: Tensor, padding_mode: str) -> Tensor:
    rows, columns = L.shape[2] // 2, L.shape[3] // 2
    if padding_mode == "zeros":
        return F.conv2d(x, L, padding=(rows, columns))
    return F.conv2d(F.pad(x, (columns, columns, rows, rows), mode="circular"), L)


def kernel_of_the_exponential(L: Tensor, *, in_channels: int, out_channels: int, stride: int, terms: int) -> Tensor:
    """The kernel (out, in, s·(2K⌊kh/2⌋ + 1), …) of exp(J) away from the borders, as a convolution of stride s.

    It is the response to single pixels, so it costs as much as in·s² images of its size.
    """
    size = [2 * terms * (k // 2) + 1 for k in L.shape[2:]]
    n = in_channels * stride**2
    pixel = torch.zeros(n, n, *size, dtype=L.dtype, device=L.device)
    pixel[:, :, size[0] // 2, size[1] // 2] = torch.eye(n, dtype=L.dtype, device=L.device)
    with full_precision(L), exact_products(convolutions=True):
        response = skew_orthogonal_convolution(
            pixel, L, out_channels=out_channels, stride=1, terms=terms, padding_mode="zeros"
        )
    return F.pixel_shuffle(response.transpose(0, 1).flip(-1, -2), stride)


def filled_up(weight: Tensor, stride: int) -> Tensor:
    """The zero-padded filter (c, c, kh, kw) that acts on s × s pixel blocks as channels, like ``weight``
    (out, in, kh, kw) with stride s."""
    out_channels, in_channels, *kernel = weight.shape
    c = stored_channels(in_channels, out_channels, stride)
    coarse = weight.new_zeros(out_channels, in_channels, stride, stride, *kernel)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            # An offset from the centre is s·q + r: q on the coarse grid, r the pixel within a block.
            (qi, ri), (qj, rj) = divmod(i - kernel[0] // 2, stride), divmod(j - kernel[1] // 2, stride)
            coarse[:, :, ri, rj, qi + kernel[0] // 2, qj + kernel[1] // 2] = weight[:, :, i, j]
    M = weight.new_zeros(c, c, *kernel)
    M[:out_channels, : in_channels * stride**2] = coarse.flatten(1, 3)
    return M
