"""The singular values of a convolution as the linear map that it is on images, not of its flattened weight.

On a periodic grid the Fourier transform turns a convolution into one small matrix per frequency, and the singular
values of all of them together are those of the convolution (Sedghi, Gupta and Long, ICLR 2019). A stride is a stride-1
convolution of the phases of the grid (polyphase form): in·∏stride channels on a grid that much coarser.
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
    """Where the taps of a kernel lie on a periodic grid of ``size`` points."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def layer_grid(layer: nn.Module | None, input_size: int | Sequence[int], where: str) -> Grid:
    """The grid of a convolution; of a transposed one that of its output, since it is the adjoint of a convolution."""
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
    """One matrix per frequency: (groups, *frequencies, out/groups, in/groups · ∏stride), complex.

    The last frequency axis is halved, as in ``torch.fft.rfftn``: a real kernel has conjugate matrices in the rest.
    """
    kernel = weight.reshape(grid.groups, weight.shape[0] // grid.groups, *weight.shape[1:])
    dimensions = len(grid.size)
    for axis, (n, dilation) in enumerate(zip(grid.size, grid.dilation, strict=True)):
        # Taps beyond the grid wrap around; where they begin (the padding) only permutes the input.
        at = torch.arange(kernel.shape[3 + axis], device=weight.device) * dilation % n
        shape = (*kernel.shape[: 3 + axis], n, *kernel.shape[4 + axis :])
        kernel = kernel.new_zeros(shape).index_add(3 + axis, at, kernel)
    split = [part for n, stride in zip(grid.size, grid.stride, strict=True) for part in (n // stride, stride)]
    coarse, phases = range(3, 3 + 2 * dimensions, 2), range(4, 4 + 2 * dimensions, 2)
    matrices = kernel.reshape(*kernel.shape[:3], *split).permute(0, *coarse, 1, 2, *phases).flatten(2 + dimensions)
    return torch.fft.rfftn(matrices, dim=list(range(1, 1 + dimensions)))


def convolution_singular_values(layer: nn.Module | Tensor, input_size: int | Sequence[int]) -> Tensor:
    """All singular values of a convolution as a map from images to images, largest first.

    The flattened weight has others: the norm of a k × k convolution is at most k σ_max(W), as every pixel is read k²
    times, and may be anything down to the norm of a single tap of the kernel.

    Assumed is **circular padding** to an output of the input's size divided by the stride, whatever the layer's own
    padding is. For a stride-1 layer with zero padding the norm is at most that of the circular convolution on a grid
    larger by the extent of the kernel less one, of which it is a part; the small singular values may differ more.

    Args:
        layer: a Conv1d–3d or ConvTranspose1d–3d with its stride, dilation and groups (and its weight in use, if
            it is parametrised), or a weight (out, in, *kernel) of stride 1.
        input_size: of the layer's input, one integer or one for each spatial dimension; a multiple of the stride.

    Returns:
        A vector in the real dtype of the weight (half precision: float32): all min(inputs, outputs) singular
        values, with multiplicity. Differentiable where they are distinct.

    Raises:
        TypeError: neither a layer nor a tensor.
        ValueError: not a convolution, or a size that does not fit.

    Complexity: an FFT of the zero-filled kernel and one SVD of an out × in·∏stride matrix for half of the
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
    twice = sigma.narrow(last, 1, math.ceil(points / 2) - 1)  # the frequencies whose conjugates rfftn leaves out
    return torch.cat([sigma.flatten(), twice.flatten()]).sort(descending=True)[0]
