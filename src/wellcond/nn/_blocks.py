"""Feature maps as blocks: (K, G, d, n) views of (N, C, *spatial), whichever way they lie in memory.

With the channels before the space every image is a block (K = N, n = L); with the channels last, or without space, the
whole batch is one (K = 1, n = N·L). Neither is copied to the other: BLAS takes both.
"""

from __future__ import annotations

from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the channels of (N, C, *spatial) are the innermost in memory."""
    return x.dim() == 2 or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())


def as_blocks(x: Tensor, groups: int, last: bool) -> Tensor:
    """(K, G, d, n) of (N, C, *spatial): a view wherever x is laid out as ``last`` says, else a copy."""
    d = x.shape[1] // groups
    if last:
        # A size-0 batch cannot have its last size inferred.
        rows = x.movedim(1, -1).contiguous()
        return rows.view(rows.numel() // max(x.shape[1], 1), groups, d).permute(1, 2, 0).unsqueeze(0)
    return x.reshape(x.shape[0], groups, d, x.shape[2:].numel())


def new_like(x: Tensor, last: bool) -> Tensor:
    """An empty tensor of the shape and dtype of x in that layout."""
    if not last:
        return x.new_empty(x.shape)
    return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)


def from_blocks(blocks: Tensor, like: Tensor, last: bool) -> Tensor:
    """The inverse of :func:`as_blocks`: (N, C, *spatial) of the shape of ``like``; differentiable."""
    if not last:
        return blocks.reshape(like.shape)
    return blocks.squeeze(0).permute(2, 0, 1).reshape(like.movedim(1, -1).shape).movedim(-1, 1)
