"""Sums and products over activations, (K, G, d, n) blocks, in pieces that fit a processor's cache.

What one operation leaves of a piece is still in the cache for the next, so that subtracting an origin, converting
half precision and adding a second product cost little, and no copy of the activations is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import LARGEST_KEPT, scratch_buffer

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Of a joined piece, which is copied anyway, so that one wide product is worth more.
JOINED_ENTRIES = LARGEST_KEPT
# Off the CPU a piece only bounds the memory of its copy; few large kernels are faster.
PIECES_ELSEWHERE = 8
# From this matrix size on, only one of the two off-diagonal quarters of a symmetric product is computed.
HALVED = 256


class Piece(NamedTuple):
    """Some of the samples: the slice of a (K, G, d, n) tensor that holds them.

    Images of few pixels are ``joined``: products of narrow matrices are slow, so a piece is copied side by side.
    """

    axis: int
    start: int
    length: int
    joined: bool

    def of(self, blocks: Tensor) -> Tensor:
        """A view of the slice of what ``as_blocks`` gives: (k·G, d, n), or (G, d, k, n) for joining to (G, d, k·n)."""
        piece = blocks.narrow(self.axis, self.start, self.length)
        return piece.permute(1, 2, 0, 3) if self.joined else piece.flatten(0, 1)


def pieces(blocks: Tensor) -> Iterator[Piece]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries, along K or, for a single block, n.

    The first piece is the longest. Only the shape and the device matter: the pieces of one tensor serve for another.
    """
    if not blocks.numel():
        return
    K, _, d, n = blocks.shape
    axis = 0 if K > 1 else 3
    total = blocks.shape[axis]
    joined = K > 1 and 4 * n <= d
    limit = JOINED_ENTRIES if joined else CACHED_ENTRIES
    if blocks.device.type != "cpu":
        limit = max(limit, blocks.numel() // PIECES_ELSEWHERE)
    # Otherwise a piece along K comes with as many d × d matrices as it has images and groups.
    entries = blocks.numel() * (max(n, d) / n if K > 1 and not joined else 1)
    step = max(1, int(limit * total / entries))
    for start in range(0, total, step):
        yield Piece(axis, start, min(step, total - start), joined)


class CentredPieces:
    """Blocks to be read piece by piece in the working dtype, minus an origin (G, d, 1) if there is one."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype, origin: Tensor | None = None) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.origin = None if origin is None else per_image(origin, blocks)
        self._buffer: Tensor | None = None
        self._slot = 0

    def read(self, piece: Piece, slot: int = 0) -> Tensor:
        """The piece itself where nothing is to be done to it, else a copy in the scratch buffer of this slot.

        The next reading with the same slot overwrites the copy.
        """
        part = piece.of(self.blocks)
        if self.origin is None and part.dtype == self.dtype and not piece.joined:
            return part
        if self._buffer is None or self._buffer.shape != part.shape or self._slot != slot:
            self._slot, self._buffer = slot, scratch_buffer(part, self.dtype, slot, contiguous=piece.joined)
        if self.origin is None:
            self._buffer.copy_(part)
        else:
            origin = self.origin.unsqueeze(-1) if piece.joined else self.origin[: len(part)]
            if part.dtype == self.dtype:
                torch.sub(part, origin, out=self._buffer)
            else:
                self._buffer.copy_(part).sub_(origin)
        return self._buffer.flatten(2)


def per_image(groupwise: Tensor, blocks: Tensor) -> Tensor:
    """One matrix or vector a group, (G, …), repeated for every image of the longest piece: (k·G, …).

    One group is not copied.
    """
    longest = next(pieces(blocks), None)
    if longest is None or longest.axis != 0 or longest.joined or longest.length == 1:
        return groupwise
    return groupwise.expand(longest.length, *groupwise.shape).flatten(0, 1)


def write_products(out: Tensor, start: Tensor | None, *terms: tuple[Tensor, CentredPieces]) -> None:
    """``out`` = start + Σ A B: A (G, d, d) and start (G, d, 1) by groups, B and ``out`` (K, G, d, n)."""
    start = None if start is None else per_image(start, out)
    factors = [(per_image(A, out), B) for A, B in terms]
    # Along the samples the product adds the start at no cost; across short rows of channels it is added later.
    along = out.stride(-1) == 1
    dtype = terms[0][1].dtype
    for piece in pieces(out):
        target = into = piece.of(out)
        if piece.joined or out.dtype != dtype:
            into = scratch_buffer(target, dtype, len(terms), contiguous=piece.joined).flatten(2)
        total = None
        for slot, (A, features) in enumerate(factors):
            B = features.read(piece, slot)
            A = A[: len(B)]
            if total is not None:
                total.baddbmm_(A, B)
            elif start is not None and along:
                total = torch.baddbmm(start[: len(B)], A, B, out=into)
            else:
                total = torch.bmm(A, B, out=into)
        assert total is not None
        if start is not None and not along:
            total += start[: len(total)]
        if into is not target:
            target.copy_(total.view(target.shape))


def sum_of_products(left: CentredPieces, right: CentredPieces) -> Tensor:
    """Σ A Bᵀ over all samples, by groups: (G, d, d)."""
    G, d = left.blocks.shape[1:3]
    half = d // 2 if right is left and d >= HALVED else 0
    total: Tensor | None = None
    for piece in pieces(left.blocks):
        A = left.read(piece, 0)
        B = A if right is left else right.read(piece, 1)
        if total is None:  # the first piece has as many matrices as any
            total = A.new_zeros(A.shape[0], d, d) if half else torch.bmm(A, B.mT)
            if not half:
                continue
        into = total[: A.shape[0]]
        if half:
            into[:, :half].baddbmm_(A[:, :half], B.mT)
            into[:, half:, half:].baddbmm_(A[:, half:], B[:, half:].mT)
        else:
            into.baddbmm_(A, B.mT)
    if total is None:
        return left.blocks.new_zeros(G, d, d, dtype=left.dtype)
    if total.shape[0] != G:
        total = total.view(-1, G, d, d).sum(0)
    if half:
        total[:, half:, :half] = total[:, :half, half:].mT
    return total


def sum_of_samples(features: CentredPieces) -> Tensor:
    """Σ over samples, (G, d, 1), in the working dtype."""
    blocks = features.blocks
    if blocks.dtype == features.dtype and features.origin is None:
        return blocks.sum(3).sum(0).unsqueeze(-1)  # in this order twice as fast as over both at once
    G, d = blocks.shape[1:3]
    total = blocks.new_zeros(G, d, dtype=features.dtype)
    for piece in pieces(blocks):
        total += features.read(piece).sum(-1).view(-1, G, d).sum(0)
    return total.unsqueeze(-1)
