"""Sums and products over activations, (K, G, d, n) blocks, in pieces that fit a processor's cache.

What one operation leaves of a piece is still in the cache for the next, so that subtracting an origin, converting
half precision and adding a second product cost little, and no copy of the activations is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Off the CPU a piece only bounds the memory of its copy; few large kernels are quicker.
PIECES_ELSEWHERE = 8


class Piece(NamedTuple):
    """Some of the samples: the slice of a (K, G, d, n) tensor that holds them."""

    axis: int
    start: int
    length: int

    def of(self, blocks: Tensor) -> Tensor:
        """The slice, (k·G, d, n) where the layout allows a view of it."""
        piece = blocks.narrow(self.axis, self.start, self.length)
        return piece.flatten(0, 1)


def pieces(blocks: Tensor) -> Iterator[Piece]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries, along K or, for a single block, n."""
    if not blocks.numel():
        return
    K, _, d, n = blocks.shape
    axis = 0 if K > 1 else 3
    total = blocks.shape[axis]
    limit = CACHED_ENTRIES if blocks.device.type == "cpu" else max(CACHED_ENTRIES, blocks.numel() // PIECES_ELSEWHERE)
    # A piece along K comes with as many d × d matrices as it has images and groups.
    entries = blocks.numel() * (max(n, d) / n if K > 1 else 1)
    step = max(1, int(limit * total / entries))
    for start in range(0, total, step):
        yield Piece(axis, start, min(step, total - start))


class Reader:
    """Pieces of blocks in the working dtype, minus an origin (G, d, 1) if there is one, through one small buffer."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype, origin: Tensor | None = None) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.origin = None if origin is None else Repeated(origin)
        self._buffer: Tensor | None = None

    def __call__(self, piece: Piece) -> Tensor:
        part = piece.of(self.blocks)
        if self.origin is None and part.dtype == self.dtype:
            return part
        if self._buffer is None or self._buffer.shape != part.shape:
            self._buffer = torch.empty_like(part, dtype=self.dtype)
        if self.origin is not None and part.dtype == self.dtype:
            return torch.sub(part, self.origin(part), out=self._buffer)
        self._buffer.copy_(part)
        return self._buffer if self.origin is None else self._buffer.sub_(self.origin(part))


class Repeated:
    """One matrix or vector a group, (G, …), for every image of a piece: (k·G, …). Of one group no copy is made."""

    def __init__(self, groupwise: Tensor) -> None:
        self.groupwise, self._wide = groupwise, groupwise

    def __call__(self, part: Tensor) -> Tensor:
        if part.shape[0] > self._wide.shape[0]:
            count = part.shape[0] // self.groupwise.shape[0]
            self._wide = self.groupwise.expand(count, *self.groupwise.shape).flatten(0, 1)
        return self._wide[: part.shape[0]]


def write(out: Tensor, start: Tensor | None, *terms: tuple[Tensor, Reader]) -> None:
    """``out`` = start + Σ A B: A (G, d, d) and start (G, d, 1) by groups, B and ``out`` (K, G, d, n)."""
    begin = None if start is None else Repeated(start)
    factors = [(Repeated(A), read) for A, read in terms]
    # Along the samples the product takes the start up at no cost; across short rows of channels it is added later.
    along = out.stride(-1) == 1
    for piece in pieces(out):
        target = piece.of(out)
        into = target if target.dtype == terms[0][1].dtype else None
        total = None
        for A, read in factors:
            B = read(piece)
            if total is not None:
                total.baddbmm_(A(B), B)
            elif begin is not None and along:
                total = torch.baddbmm(begin(B), A(B), B, out=into)
            else:
                total = torch.bmm(A(B), B, out=into)
        assert total is not None
        if begin is not None and not along:
            total += begin(total)
        if into is None:
            target.copy_(total)


def sum_of_products(left: Reader, right: Reader) -> Tensor:
    """Σ A Bᵀ over all samples, by groups: (G, d, d)."""
    G, d = left.blocks.shape[1:3]
    total: Tensor | None = None
    for piece in pieces(left.blocks):
        A = left(piece)
        B = A if right is left else right(piece)
        if total is None:
            total = torch.bmm(A, B.mT)  # the longest piece, with as many matrices as any
        else:
            total[: A.shape[0]].baddbmm_(A, B.mT)
    if total is None:
        return left.blocks.new_zeros(G, d, d, dtype=left.dtype)
    return total if total.shape[0] == G else total.view(-1, G, d, d).sum(0)


def sum_of_samples(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over samples, (G, d, 1), in ``dtype``."""
    if blocks.dtype == dtype:
        return blocks.sum((0, 3)).unsqueeze(-1)
    G, d = blocks.shape[1:3]
    read, total = Reader(blocks, dtype), blocks.new_zeros(G, d, dtype=dtype)
    for piece in pieces(blocks):
        total += read(piece).sum(-1).view(-1, G, d).sum(0)
    return total.unsqueeze(-1)
