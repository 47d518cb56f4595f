"""The same moments and affine map in ordinary operations: for compilers, exporters and the transforms of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from wellcond._shared.precision import working_dtype
from wellcond._shared.torch_internals import (
    is_compiling,
    is_exporting,
    is_shape_only,
    under_forward_mode,
    under_functorch,
)


def needs_plain_operations(x: Tensor) -> bool:
    """Whether x is being traced, or transformed in a way for which our autograd functions have no rule."""
    # Tensors on "meta" outside a trace are computed as on an accelerator.
    traced = is_compiling() or torch.jit.is_tracing() or (is_shape_only(x) and not x.is_meta)
    return traced or under_functorch() or under_forward_mode()


def plain_moments(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (G, d, 1) and covariance (G, d, d) of (K, G, d, n); zero for no samples."""
    count = max(blocks.shape[0] * blocks.shape[-1], 1)
    mean = blocks.sum((0, 3)).unsqueeze(-1) / count
    # The sum of many values of one sign is rounded; that of the differences hardly is.
    mean = mean + (blocks - mean).sum((0, 3)).unsqueeze(-1) / count
    centred = blocks - mean
    return mean, torch.einsum("kgin,kgjn->gij", centred, centred) / count


def plain_affine_map(x: Tensor, W: Tensor, b: Tensor, origin: Tensor | None) -> Tensor:
    """W (x − origin) + b by groups, in the dtype of x; on the CPU and in exported graphs as a 1 × 1 convolution."""
    groups, d = W.shape[:2]
    work = x.to(working_dtype(x.dtype))
    if origin is not None:
        work = work - origin.reshape(-1, *(1,) * (x.dim() - 2))
    if x.device.type != "cpu" and not is_exporting():  # cuDNN would convolve in TF32
        return (W @ work.reshape(x.shape[0], groups, d, -1) + b).reshape(x.shape).to(x.dtype)
    spatial = max(x.dim() - 2, 1)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    weight = W.reshape(groups * d, d, *(1,) * spatial)
    y = convolve(work if x.dim() > 2 else work.unsqueeze(-1), weight, b.flatten(), groups=groups)
    return y.reshape(x.shape).to(x.dtype) if x.dim() == 2 else y.to(x.dtype)
