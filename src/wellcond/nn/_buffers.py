"""Room for pieces of activations, kept by each thread from call to call.

Memory that is fresh from the system costs a page fault for each 4 KB, which takes longer than the copy into it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Entries of the largest buffer that is kept: 2 MB in float32.
LARGEST_KEPT = 1 << 19


class _Kept(threading.local):
    """The buffers of one thread, by slot and dtype, each as large as was ever asked for."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, torch.dtype], Tensor] = {}


_kept = _Kept()


def room(part: Tensor, dtype: torch.dtype, slot: int, *, contiguous: bool) -> Tensor:
    """Unset memory of the shape of ``part``, and of its strides unless it shall be contiguous.

    On the CPU the same memory for every call with this slot: what was there before is lost, so nothing of it may be
    handed to a caller or saved for the backward pass.
    """
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    if type(part) is not Tensor or part.device.type != "cpu" or part.numel() > LARGEST_KEPT:
        return torch.empty_like(part, dtype=dtype, memory_format=layout)
    kept = _kept.slots.get((slot, dtype))
    if kept is None or kept.numel() < part.numel():
        with torch.inference_mode(False):  # a buffer that is born in it could not be written to outside
            kept = _kept.slots[slot, dtype] = torch.empty(part.numel(), dtype=dtype, device=part.device)
    if not contiguous and _is_dense(part):
        return kept.as_strided(part.shape, part.stride())
    return kept[: part.numel()].view(part.shape)


def _is_dense(part: Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor whose dimensions were permuted."""
    expected = 1
    for stride, size in sorted(zip(part.stride(), part.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
