"""Sums and products over activations, (K, G, d, n) blocks, in pieces that fit a processor's cache.

What one operation leaves of a piece is still in the cache for the next, so that subtracting an origin, converting
half precision and adding a second product cost little, and no copy of the activations is ever made.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import LARGEST_KEPT, scratch_buffer

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Of a joined piece, which is copied anyway, so that one wide product is worth more.
JOINED_ENTRIES = LARGEST_KEPT
# Off the CPU a piece only bounds the memory of its copy, to an eighth of the activations or 64 MB in float32: few large
# kernels are faster.
PIECES_ELSEWHERE = 8
ENTRIES_ELSEWHERE = 1 << 24
# Entries up to which an operation costs less than the passes over memory that it saves.
SMALL = 1 << 17
# On the CPU, from this matrix size on, only one of the two off-diagonal quarters of a symmetric product is computed.
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
        """A view of the slice of what ``as_blocks`` gives: (k, G, d, n), or (G, d, k, n) for joining to (G, d, k·n)."""
        piece = blocks.narrow(self.axis, self.start, self.length) if self.length < blocks.shape[self.axis] else blocks
        return piece.permute(1, 2, 0, 3) if self.joined else piece


def pieces(blocks: Tensor) -> tuple[Piece, ...]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries, along K or, for a single block, n.

    The first piece is the longest. Only the shape and the device matter: the pieces of one tensor serve for another.
    """
    return _cut(*blocks.shape, blocks.device.type == "cpu")


@lru_cache(1024)
def _cut(K: int, G: int, d: int, n: int, on_cpu: bool) -> tuple[Piece, ...]:
    numel = K * G * d * n
    if not numel:
        return ()
    axis, total = (0, K) if K > 1 else (3, n)
    joined = K > 1 and 4 * n <= d
    limit = JOINED_ENTRIES if joined else CACHED_ENTRIES
    if not on_cpu:
        limit = max(ENTRIES_ELSEWHERE, numel // PIECES_ELSEWHERE)
    # Otherwise a piece along K comes with as many d × d matrices as it has images and groups.
    entries = numel * (max(n, d) / n if K > 1 and not joined else 1)
    step = max(1, int(limit * total / entries))
    return tuple(Piece(axis, start, min(step, total - start), joined) for start in range(0, total, step))


class CentredPieces:
    """Blocks to be read piece by piece in the working dtype, minus an origin (G, d, 1) if there is one."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype, origin: Tensor | None = None) -> None:
        self.blocks, self.dtype, self.origin = blocks, dtype, origin
        self._as_it_is = origin is None and blocks.dtype == dtype
        # Off the CPU a copy is memory of its own, and is read again as long as it is the last one.
        self._keeps = blocks.device.type != "cpu"
        self._last: tuple[Piece, Tensor] | None = None

    def read(self, piece: Piece, slot: int = 0) -> Tensor:
        """The piece itself where nothing is to be done to it, else a copy in the scratch buffer of this slot.

        On the CPU the next reading with the same slot overwrites the copy.
        """
        if self._as_it_is and not piece.joined:
            return piece.of(self.blocks).flatten(0, 1)
        if self._last is not None and self._last[0] == piece:
            return self._last[1]
        part = piece.of(self.blocks)
        buffer = scratch_buffer(part, self.dtype, slot, contiguous=piece.joined)
        if self.origin is None:
            buffer.copy_(part)
        else:
            origin = self.origin.unsqueeze(-1) if piece.joined else self.origin
            if part.dtype == self.dtype or self._keeps:
                torch.sub(part, origin, out=buffer)
            else:
                buffer.copy_(part).sub_(origin)
        copy = buffer.flatten(2) if piece.joined else buffer.flatten(0, 1)
        if self._keeps:
            self._last = piece, copy
        return copy


def per_image(groupwise: Tensor, blocks: Tensor) -> Tensor:
    """One matrix or vector a group, (G, …), repeated for every image of the longest piece: (k·G, …).

    One group is not copied.
    """
    longest = next(iter(pieces(blocks)), None)
    if longest is None or longest.axis != 0 or longest.joined or longest.length == 1:
        return groupwise
    return groupwise.expand(longest.length, *groupwise.shape).flatten(0, 1)


def write_products(out: Tensor, start: Tensor | None, *terms: tuple[Tensor, CentredPieces], scale: float = 1.0) -> None:
    """``out`` = start + A₁ B₁ + scale · A₂ B₂: A (G, d, d) and start (G, d, 1) by groups, B and ``out`` (K, G, d, n)."""
    start = None if start is None else per_image(start, out)
    factors = [(per_image(A, out), B) for A, B in terms]
    # Along the samples the product adds the start at no cost; across short rows of channels it is added later.
    along = out.stride(-1) == 1
    dtype = terms[0][1].dtype
    for piece in pieces(out):
        target = piece.of(out)
        if piece.joined or out.dtype != dtype:
            into = scratch_buffer(target, dtype, len(terms), contiguous=piece.joined)
        else:
            into = target
        flat = into.flatten(2) if piece.joined else into.flatten(0, 1)
        for slot, (A, features) in enumerate(factors):
            B = features.read(piece, slot)
            A = A[: len(B)]
            if slot:
                flat.baddbmm_(A, B, alpha=scale)
            elif start is not None and along:
                torch.baddbmm(start[: len(B)], A, B, out=flat)
            else:
                torch.bmm(A, B, out=flat)
        if start is not None and not along:
            flat += start[: len(flat)]
        if into is not target:
            target.copy_(into)


def sum_of_products(left: CentredPieces, right: CentredPieces, scale: float = 1.0) -> Tensor:
    """scale · Σ A Bᵀ over all samples, by groups: (G, d, d)."""
    G, d = left.blocks.shape[1:3]
    half = d // 2 if right is left and d >= HALVED and left.blocks.device.type == "cpu" else 0
    total: Tensor | None = None
    for piece in pieces(left.blocks):
        A = left.read(piece, 0)
        B = A if right is left else right.read(piece, 1)
        if total is None:  # the first piece has as many matrices as any
            total = A.new_zeros(A.shape[0], d, d) if half else torch.baddbmm(_nothing(A), A, B.mT, beta=0, alpha=scale)
            if not half:
                continue
        into = total[: A.shape[0]]
        if half:
            into[:, :half].baddbmm_(A[:, :half], B.mT, alpha=scale)
            into[:, half:, half:].baddbmm_(A[:, half:], B[:, half:].mT, alpha=scale)
        else:
            into.baddbmm_(A, B.mT, alpha=scale)
    if total is None:
        return left.blocks.new_zeros(G, d, d, dtype=left.dtype)
    if total.shape[0] != G:
        total = total.view(-1, G, d, d).sum(0)
    if half:
        total[:, half:, :half] = total[:, :half, half:].mT
    return total


def _nothing(A: Tensor) -> Tensor:
    """A tensor to add nothing of, by ``beta=0``."""
    return A.new_empty(1, 1, 1)


def sum_of_samples(features: CentredPieces) -> Tensor:
    """Σ over samples, (G, d, 1), in the working dtype."""
    blocks, on_cpu = features.blocks, features.blocks.device.type == "cpu"
    if features.origin is None and (blocks.dtype == features.dtype or not on_cpu):
        # On large maps twice as fast in this order as over both at once.
        if on_cpu and blocks.numel() > SMALL:
            return blocks.sum(3).sum(0).unsqueeze(-1)
        return blocks.sum((0, 3), dtype=features.dtype).unsqueeze(-1)
    G, d = blocks.shape[1:3]
    total: Tensor | None = None
    for piece in pieces(blocks):
        part = features.read(piece)
        part = part.sum(-1) if piece.joined else part.view(-1, G, d, part.shape[-1]).sum((0, 3))
        total = part if total is None else total.add_(part)
    return (blocks.new_zeros(G, d, dtype=features.dtype) if total is None else total).unsqueeze(-1)


def mean_of_samples(features: CentredPieces) -> Tensor:
    """The mean over samples, (G, d, 1), of which there is one at least."""
    return sum_of_samples(features).div_(features.blocks.shape[0] * features.blocks.shape[-1])
