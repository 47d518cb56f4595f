"""An affine map of the channels, x → M x + shift with M block diagonal, put into a layer or made one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ChannelAffine(NamedTuple):
    """M as its diagonal blocks (groups, d, d), the shift (groups·d,), and the dtype of a layer made of them."""

    matrix: Tensor
    shift: Tensor
    dtype: torch.dtype


@torch.no_grad()
def absorbed(layer: nn.Module, affine: ChannelAffine) -> nn.Module | None:
    """A new layer that is ``layer`` followed by the map, or None where that is no layer of the same kind.

    Only torch's own classes are taken, without hooks: a subclass or a hook may do anything. A parametrised layer is
    read through its parametrisation; it is not changed, since its class is shared with the layer it was copied from.
    """
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    if kind not in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    blocks, d = affine.matrix.shape[:2]
    source: Any = layer
    weight, bias = source.weight.detach().double(), source.bias
    groups = 1 if kind is nn.Linear else source.groups
    channels = weight.shape[1] * groups if kind in TRANSPOSED else weight.shape[0]
    if channels != blocks * d or (channels // groups) % d:
        return None
    M = affine.matrix.to(weight.device)
    if kind in TRANSPOSED:
        # (in, out/groups, *kernel): rows that are output channels come second, in each group of inputs.
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        mixed = _times(M, rows).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    else:
        mixed = _times(M, weight)
    shift = affine.shift.to(weight.device)
    if bias is not None:
        shift = shift + _times(M, bias.detach().double())
    where = {"device": source.weight.device, "dtype": source.weight.dtype}
    new = _same(kind, source, where)
    new.weight.copy_(mixed)
    new.bias.copy_(shift)
    return new.requires_grad_(source.weight.requires_grad)


@torch.no_grad()
def channel_convolution(affine: ChannelAffine, dims: int) -> nn.Module:
    """The map as a convolution of kernel 1 in ``dims`` spatial dimensions."""
    groups, d = affine.matrix.shape[:2]
    kind = (_PointwiseConv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(groups * d, groups * d, 1, groups=groups, device=affine.matrix.device, dtype=affine.dtype)
    layer.weight.copy_(affine.matrix.flatten(0, 1).view_as(layer.weight))
    layer.bias.copy_(affine.shift)  # pyright: ignore[reportOptionalMemberAccess]
    return layer


class _PointwiseConv1d(nn.Conv1d):
    """A convolution of kernel 1 that also takes (N, C), as batch norm does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(-1)).squeeze(-1) if input.dim() == 2 else super().forward(input)


def _times(M: Tensor, rows: Tensor) -> Tensor:
    """M times a tensor whose first dimension is the channels."""
    blocks = rows.reshape(M.shape[0], M.shape[1], -1)
    return (M @ blocks).reshape(rows.shape)


def _same(kind: Any, layer: Any, where: dict[str, Any]) -> Any:
    """A new layer of the same form, with a bias."""
    if kind is nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, **where)
    form = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    if kind in TRANSPOSED:
        form["output_padding"] = layer.output_padding
    return kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, padding_mode=layer.padding_mode, **form, **where
    )
