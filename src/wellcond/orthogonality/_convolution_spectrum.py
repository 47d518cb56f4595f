"""The singular values of a convolution as a linear map on images, not of its flattened weight.

On a periodic grid the Fourier transform turns a convolution into one small matrix per frequency, and its singular
values are those of all these matrices together (Sedghi, Gupta and Long, ICLR 2019). A convolution of stride s is a
stride-1 convolution of the phases of the grid (polyphase form), with in·∏stride channels on a grid coarser by s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellcond._shared.models import described
from wellcond._shared.precision import full_precision


@dataclass(frozen=True)
class Grid:
    """The position of the taps of a kernel on a periodic grid of ``size`` points."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def layer_grid(layer: nn.Module | None, input_size: int | Sequence[int], where: str) -> Grid:
    """The grid of a convolution; of a transposed one the grid of its output, as it is the adjoint of a convolution."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise ValueError(f"{where} is not a convolution; only a convolution is another map on images than its weight")
    size = _size(input_size, len(layer.kernel_size), where)
    if layer.transposed:
        size = tuple(n * s for n, s in zip(size, layer.stride, strict=True))
    elif any(n % s for n, s in zip(size, layer.stride, strict=True)):
        raise ValueError(f"input_size {size} of {where} is not a multiple of its stride {tuple(layer.stride)}")
    return Grid(size, tuple(layer.stride), tuple(layer.dilation), layer.groups)


def _size(input_size: int | Sequence[int], dimensions: int, where: str) -> tuple[int, ...]:
    size = (input_size,) * dimensions if isinstance(input_size, int) else tuple(input_size)
    if len(size) != dimensions or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"input_size of {where} must be {dimensions} positive integer(s), the size of its images, got {input_size}"
        )
    return size


def transfer_matrices(weight: Tensor, grid: Grid) -> Tensor:
    """One complex matrix per frequency: (groups, *frequencies, out/groups, in/groups · ∏stride).

    The last frequency axis is halved as in ``torch.fft.rfftn``: the other half has the conjugate matrices.
    """
    kernel = weight.reshape(grid.groups, weight.shape[0] // grid.groups, *weight.shape[1:])
    dimensions = len(grid.size)
    for axis, (n, dilation) in enumerate(zip(grid.size, grid.dilation, strict=True)):
        # Taps beyond the grid wrap around. Their origin (the padding) only permutes the input.
        at = torch.arange(kernel.shape[3 + axis], device=weight.device) * dilation % n
        shape = (*kernel.shape[: 3 + axis], n, *kernel.shape[4 + axis :])
        kernel = kernel.new_zeros(shape).index_add(3 + axis, at, kernel)
    split = [part for n, stride in zip(grid.size, grid.stride, strict=True) for part in (n // stride, stride)]
    coarse, phases = range(3, 3 + 2 * dimensions, 2), range(4, 4 + 2 * dimensions, 2)
    matrices = kernel.reshape(*kernel.shape[:3], *split).permute(0, *coarse, 1, 2, *phases).flatten(2 + dimensions)
    return torch.fft.rfftn(matrices, dim=list(range(1, 1 + dimensions)))


def convolution_singular_values(layer: nn.Module | Tensor, input_size: int | Sequence[int]) -> Tensor:
    """All singular values of a convolution as a map from images to images, largest first.

    Those of the flattened weight W are different: the norm of a k × k convolution is at most k σ_max(W), as every pixel
    is read k² times, and may be as small as the norm of a single tap of the kernel.

    **Circular padding** is assumed, to an output of the input's size divided by the stride, whatever the padding of the
    layer. With stride 1 and zero padding, the norm is at most that of the circular convolution on a grid enlarged by
    the extent of the kernel minus one, of which it is a restriction; the small singular values may differ more.

    Args:
        layer: a Conv1d–3d or ConvTranspose1d–3d with its stride, dilation and groups (and, if it is parametrised, the
            weight in use), or a weight (out, in, *kernel) of stride 1; real floating dtype.
        input_size: spatial size of the layer's input in pixels, one integer or one per dimension; a multiple of the
            stride.

    Returns:
        All min(inputs, outputs) singular values, with multiplicity, as a vector in the dtype of the weight (float32 for
        half precision). Differentiable where they are distinct.

    Raises:
        TypeError: ``layer`` is neither a layer nor a tensor.
        ValueError: not a convolution, or a size that does not fit.

    Complexity: an FFT of the zero-padded kernel and one SVD of an out × in·∏stride matrix for half of the
    frequencies: O(in·out·(log n + min(in, out))·n) for n = ∏input_size, not O(n³).
    Source: Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019.

    Example:
        >>> import torch
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> convolution_singular_values(blur, 8)[0]  # a constant image is unchanged
        tensor(1.)
    """
    if isinstance(layer, Tensor):
        weight, where = layer, f"a weight of shape {tuple(layer.shape)}"
        ones = (1,) * (weight.ndim - 2)
        if weight.ndim < 3 or not weight.is_floating_point():
            raise ValueError(f"{where} and {weight.dtype} is not a convolution's: (out, in, *kernel), real, is needed")
        grid = Grid(_size(input_size, weight.ndim - 2, where), ones, ones)
    elif isinstance(layer, nn.Module):
        grid = layer_grid(layer, input_size, described(layer, ""))
        weight = layer.weight
        assert isinstance(weight, Tensor)
    else:
        raise TypeError(f"expected a convolution or its weight, got {type(layer).__name__}")
    with full_precision(weight):
        T = transfer_matrices(weight.to(torch.promote_types(weight.dtype, torch.float32)), grid)
        sigma = torch.linalg.svdvals(T)
    last, points = len(grid.size), grid.size[-1] // grid.stride[-1]
    twice = sigma.narrow(last, 1, math.ceil(points / 2) - 1)  # frequencies whose conjugates rfftn omits
    return torch.cat([sigma.flatten(), twice.flatten()]).sort(descending=True)[0]
