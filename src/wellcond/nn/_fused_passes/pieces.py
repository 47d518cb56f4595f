"""Sums and products over activations in pieces that fit a processor's cache.

What one operation leaves of a piece is still in the cache for the next, so that subtracting an origin, converting
half precision and adding a second product cost little, and no copy of the activations is ever made. Small activations,
and those on other devices, are one piece: there each operation costs more than the memory that it passes over.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import LARGEST_KEPT, as_blocks, block_sizes, new_like, scratch_buffer

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Of a joined piece, which is copied anyway, so that one wide product is worth more.
JOINED_ENTRIES = LARGEST_KEPT
# Off the CPU a piece only bounds the memory of its copy, to an eighth of the activations or 64 MB in float32: few large
# kernels are faster.
PIECES_ELSEWHERE = 8
ENTRIES_ELSEWHERE = 1 << 24
# Entries up to which the CPU sums faster over all at once than first along the pixels.
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
        piece = blocks.narrow(self.axis, self.start, self.length)
        return piece.permute(1, 2, 0, 3) if self.joined else piece


@lru_cache(1024)
def cut(K: int, G: int, d: int, n: int, on_cpu: bool) -> tuple[Piece, ...]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries, along K or, for a single block, n.

    The first piece is the longest; what is empty has none.
    """
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


class Samples:
    """Activations to be read piece by piece in the working dtype, minus an origin (G, d, 1) if there is one.

    Attributes:
        x: (N, C, *spatial).
        sizes: (K, G, d, n) of its blocks, see :mod:`.layout`.
        count: K·n.
        pieces: what it is cut into: that of another tensor of the same sizes too.
        whole: (K·G, d, n), where all is one piece that is read as it is; else None.
    """

    def __init__(self, x: Tensor, groups: int, last: bool, dtype: torch.dtype, origin: Tensor | None = None) -> None:
        self.x, self.last, self.dtype, self.origin = x, last, dtype, origin
        self.sizes = K, G, d, n = block_sizes(x, groups, last)
        self.count = K * n
        self.on_cpu = x.device.type == "cpu"
        self.pieces = cut(K, G, d, n, self.on_cpu)
        self._as_it_is = origin is None and x.dtype == dtype
        self.whole = None
        if self._as_it_is and not last and len(self.pieces) == 1 and not self.pieces[0].joined:
            self.whole = x.reshape(K * G, d, n)
        self._blocks: Tensor | None = None
        # Off the CPU a copy is memory of its own, and is read again as long as it is the last one.
        self._last: tuple[Piece, Tensor] | None = None

    @property
    def blocks(self) -> Tensor:
        """(K, G, d, n), as they are."""
        if self._blocks is None:
            self._blocks = as_blocks(self.x, self.sizes[1], self.last)
        return self._blocks

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
            if part.dtype == self.dtype or not self.on_cpu:
                torch.sub(part, origin, out=buffer)
            else:
                buffer.copy_(part).sub_(origin)
        copy = buffer.flatten(2) if piece.joined else buffer.flatten(0, 1)
        if not self.on_cpu:
            self._last = piece, copy
        return copy

    def sum(self) -> Tensor:
        """Σ over samples, (G, d, 1), in the working dtype."""
        _, G, d, _ = self.sizes
        if self.whole is not None and G == 1 and self.x.numel() <= SMALL:
            return self.whole.sum((0, 2)).view(1, d, 1)
        if self.origin is None and (self._as_it_is or not self.on_cpu):
            # On large maps twice as fast in this order as over both at once.
            if self.on_cpu and self.x.numel() > SMALL:
                return self.blocks.sum(3).sum(0).unsqueeze(-1)
            return self.blocks.sum((0, 3), dtype=self.dtype).unsqueeze(-1)
        total: Tensor | None = None
        for piece in self.pieces:
            part = self.read(piece)
            part = part.sum(-1) if piece.joined else part.view(-1, G, d, part.shape[-1]).sum((0, 3))
            total = part if total is None else total.add_(part)
        return (self.x.new_zeros(G, d, dtype=self.dtype) if total is None else total).unsqueeze(-1)

    def mean(self) -> Tensor:
        """The mean over samples, (G, d, 1), of which there is one at least."""
        if self.whole is not None and self.sizes[1] == 1 and self.x.numel() <= SMALL:
            return self.whole.mean((0, 2), keepdim=True)
        return self.sum().div_(self.count)


# A matrix a group (G, d, d), and the activations that it multiplies.
Term = tuple[Tensor, Samples]


def affine(start: Tensor | None, *terms: Term, scale: float = 1.0) -> Tensor:
    """start + A₁ B₁ + scale · A₂ B₂, start (G, d, 1) by groups, as activations in the layout and dtype of those of B₁."""
    samples = terms[0][1]
    K, G, _, _ = samples.sizes
    if any(B.whole is None for _, B in terms):
        out = new_like(samples.x, samples.last)
        _write(as_blocks(out, G, samples.last), start, terms, scale)
        return out
    total: Tensor | None = None
    for A, B in terms:
        A = A.expand(K, -1, -1) if G == 1 else _per_image(A, samples)
        if total is not None:
            total.baddbmm_(A, B.whole, alpha=scale)  # pyright: ignore[reportArgumentType]
        elif start is not None:
            start = start if G == 1 else _per_image(start, samples)
            total = torch.baddbmm(start, A, B.whole)  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            total = torch.bmm(A, B.whole)  # pyright: ignore[reportArgumentType]
    assert total is not None
    return total.view(samples.x.shape)


def _write(out: Tensor, start: Tensor | None, terms: tuple[Term, ...], scale: float) -> None:
    """The same written to ``out`` (K, G, d, n), piece by piece."""
    samples = terms[0][1]
    start = None if start is None else _per_image(start, samples)
    factors = [(_per_image(A, samples), B) for A, B in terms]
    # Along the samples the product adds the start at no cost; across short rows of channels it is added later.
    along = out.stride(-1) == 1
    for piece in samples.pieces:
        target = piece.of(out)
        into = target
        if piece.joined or out.dtype != samples.dtype:
            into = scratch_buffer(target, samples.dtype, len(terms), contiguous=piece.joined)
        flat = into.flatten(2) if piece.joined else into.flatten(0, 1)
        for slot, (A, features) in enumerate(factors):
            B = features.read(piece, slot)
            A = A[: B.shape[0]]
            if slot:
                flat.baddbmm_(A, B, alpha=scale)
            elif start is not None and along:
                torch.baddbmm(start[: B.shape[0]], A, B, out=flat)
            else:
                torch.bmm(A, B, out=flat)
        if start is not None and not along:
            flat += start[: flat.shape[0]]
        if into is not target:
            target.copy_(into)


def _per_image(groupwise: Tensor, samples: Samples) -> Tensor:
    """One matrix or vector a group, (G, …), repeated for every image of the longest piece: (k·G, …).

    One group is not copied.
    """
    longest = samples.pieces[0] if samples.pieces else None
    if longest is None or longest.axis != 0 or longest.joined or longest.length == 1:
        return groupwise
    return groupwise.expand(longest.length, *groupwise.shape).flatten(0, 1)


def sum_of_products(left: Samples, right: Samples, scale: float = 1.0) -> Tensor:
    """scale · Σ A Bᵀ over all samples, by groups: (G, d, d)."""
    K, G, d, _ = left.sizes
    half = d // 2 if right is left and d >= HALVED and left.on_cpu else 0
    if not half and left.whole is not None and right.whole is not None and scale == 1.0:
        total = torch.bmm(left.whole, right.whole.mT)
        if G == 1:
            return total if K == 1 else total.sum(0, keepdim=True)
        return total.view(K, G, d, d).sum(0)
    total = None
    for piece in left.pieces:
        A = left.read(piece, 0)
        B = A if right is left else right.read(piece, 1)
        if total is None:  # the first piece has as many matrices as any
            if half:
                total = A.new_zeros(A.shape[0], d, d)
            else:  # nothing of the empty tensor is added
                total = torch.baddbmm(A.new_empty(1, 1, 1), A, B.mT, beta=0, alpha=scale)
                continue
        into = total[: A.shape[0]]
        if half:
            into[:, :half].baddbmm_(A[:, :half], B.mT, alpha=scale)
            into[:, half:, half:].baddbmm_(A[:, half:], B[:, half:].mT, alpha=scale)
        else:
            into.baddbmm_(A, B.mT, alpha=scale)
    if total is None:
        return left.x.new_zeros(G, d, d, dtype=left.dtype)
    if total.shape[0] != G:
        total = total.view(-1, G, d, d).sum(0)
    if half:
        total[:, half:, :half] = total[:, :half, half:].mT
    return total
