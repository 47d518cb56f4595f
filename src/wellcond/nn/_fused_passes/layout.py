"""Feature maps as blocks, (K, G, d, n) views of (N, C, *spatial) whichever way they lie in memory, and scratch buffers.

With the channels before the space every image is a block (K = N, n = L); with the channels last, or without space, the
whole batch is one (K = 1, n = N·L). Neither is copied to the other: BLAS takes both.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Entries of the largest scratch buffer that is kept: 2 MB in float32.
LARGEST_KEPT = 1 << 19


def channels_last(x: Tensor) -> bool:
    """Whether the channels of (N, C, *spatial) are the innermost in memory."""
    return x.dim() == 2 or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())


def block_sizes(shape: torch.Size, groups: int, last: bool) -> tuple[int, int, int, int]:
    """(K, G, d, n) of the blocks of (N, C, *spatial)."""
    N, C, *spatial = shape
    n = math.prod(spatial)
    return (1, groups, C // groups, N * n) if last else (N, groups, C // groups, n)


def as_blocks(x: Tensor, groups: int, last: bool) -> Tensor:
    """(K, G, d, n) of (N, C, *spatial): a view wherever x is laid out as ``last`` says, else a copy."""
    sizes = block_sizes(x.shape, groups, last)
    if not last:
        return x.reshape(sizes)
    # The last size of an empty batch cannot be inferred.
    return x.movedim(1, -1).contiguous().view(sizes[3], groups, sizes[2]).permute(1, 2, 0).unsqueeze(0)


def new_like(x: Tensor, last: bool) -> Tensor:
    """An empty tensor of the shape and dtype of x in that layout; no view, which could not be written to in place."""
    if not last or x.dim() == 2:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    C, *spatial = x.shape[1:]
    rows = [C * math.prod(spatial[i:]) for i in range(len(spatial) + 1)]
    return x.new_empty_strided(x.shape, (rows[0], 1, *rows[1:]))


def from_blocks(blocks: Tensor, like: Tensor, last: bool) -> Tensor:
    """The inverse of :func:`as_blocks`: (N, C, *spatial) of the shape of ``like``; differentiable."""
    if not last:
        return blocks.reshape(like.shape)
    return blocks.squeeze(0).permute(2, 0, 1).reshape(like.movedim(1, -1).shape).movedim(-1, 1)


class _ScratchBuffers(threading.local):
    """The buffers of one thread by slot and dtype, each as large as the largest request so far.

    Fresh memory costs a page fault for each 4 KB, which takes longer than the copy into it.

    Attributes:
        slots: the memory.
        views: what of it was handed out last.
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[int, torch.dtype], Tensor] = {}
        self.views: dict[tuple[int, torch.dtype], Tensor] = {}


_scratch = _ScratchBuffers()


def scratch_buffer(part: Tensor, dtype: torch.dtype, slot: int, *, contiguous: bool) -> Tensor:
    """``empty_like`` of ``part``, in its strides unless ``contiguous``.

    On the CPU every call with the same slot returns the same memory and overwrites what was there, so nothing of it may
    be handed to a caller or saved for the backward pass.
    """
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    numel = part.numel()
    if type(part) is not Tensor or part.device.type != "cpu" or numel > LARGEST_KEPT:
        return torch.empty_like(part, dtype=dtype, memory_format=layout)
    kept = _scratch.slots.get((slot, dtype))
    if kept is None or kept.numel() < numel:
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
            kept = _scratch.slots[slot, dtype] = torch.empty(numel, dtype=dtype, device=part.device)
    if contiguous or part.is_contiguous():
        view = kept[:numel].view(part.shape)
    else:
        view = kept.as_strided(part.shape, torch.empty_like(part, memory_format=layout, device="meta").stride())
    _scratch.views[slot, dtype] = view
    return view


def is_intact(buffer: Tensor, slot: int) -> bool:
    """Whether what ``scratch_buffer`` gave is kept, and no later one of its slot has the memory."""
    return buffer.device.type != "cpu" or _scratch.views.get((slot, buffer.dtype)) is buffer
