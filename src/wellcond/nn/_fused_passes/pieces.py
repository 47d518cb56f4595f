"""Sums and products over activations in pieces that fit a processor's cache.

What one operation leaves of a piece is still in the cache for the next, so that subtracting an origin, converting
half precision and adding a second product cost little, and no copy of the activations is ever made. Small activations,
and those on other devices, are one piece: there each operation costs more than the memory that it passes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.precision import working_dtype

from .layout import LARGEST_KEPT, as_blocks, block_sizes, channels_last, new_like, scratch_buffer

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Of a joined piece, which is copied anyway, so that one wide product is worth more.
JOINED_ENTRIES = LARGEST_KEPT
# Off the CPU a piece only bounds the memory of its copy, to an eighth of the activations or 64 MB in float32: few large
# kernels are faster.
PIECES_ELSEWHERE = 8
ENTRIES_ELSEWHERE = 1 << 24
# Entries up to which the CPU spends more on an operation than on its memory.
SMALL = 1 << 15
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


@dataclass(frozen=True)
class Geometry:
    """How activations of one shape are worked on.

    Attributes:
        sizes: (K, G, d, n) of the blocks, see :mod:`.layout`.
        last: whether their channels are the innermost in memory.
        dtype: of the work.
        on_cpu: whether they are there.
        count: K·n samples.
        pieces: what they are cut into, along K or, for a single block, n; the first is the longest.
        at_once: whether they are one piece whose images are multiplied where they lie.
        small: whether an operation more costs less than it saves.
    """

    sizes: tuple[int, int, int, int]
    last: bool
    dtype: torch.dtype
    on_cpu: bool
    count: int
    pieces: tuple[Piece, ...]
    at_once: bool
    small: bool


def geometry_of(x: Tensor, groups: int) -> Geometry:
    """Of (N, C, *spatial), and of what else has the same shape."""
    return _geometry(tuple(x.shape), groups, channels_last(x), working_dtype(x.dtype), x.device.type == "cpu")


@lru_cache(1024)
def _geometry(shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype, on_cpu: bool) -> Geometry:
    sizes = K, _, _, n = block_sizes(shape, groups, last)
    pieces = cut(*sizes, on_cpu)
    at_once = len(pieces) == 1 and not last and not pieces[0].joined
    return Geometry(sizes, last, dtype, on_cpu, K * n, pieces, at_once, on_cpu and math.prod(shape) <= SMALL)


def cut(K: int, G: int, d: int, n: int, on_cpu: bool) -> tuple[Piece, ...]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries; what is empty has none."""
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
        x: (N, C, *spatial), in the layout of the geometry if it is to be read without a copy.
        whole: (K·G, d, n), where all is one piece that is read as it is, or small; else None.
    """

    def __init__(self, x: Tensor, geometry: Geometry, origin: Tensor | None = None) -> None:
        self.x, self.geometry, self.origin = x, geometry, origin
        self._as_it_is = origin is None and x.dtype == geometry.dtype
        self.whole: Tensor | None = None
        if geometry.at_once and (self._as_it_is or geometry.small):
            K, G, d, n = geometry.sizes
            if origin is None:
                self.whole = x.reshape(K * G, d, n).to(geometry.dtype)
            elif G == 1:
                self.whole = x.reshape(K, d, n) - origin
            else:
                self.whole = (x.reshape(K, G, d, n) - origin).reshape(K * G, d, n)
        self._blocks: Tensor | None = None
        # Off the CPU a copy is memory of its own, and is read again as long as it is the last one.
        self._last: tuple[Piece, Tensor] | None = None

    @property
    def blocks(self) -> Tensor:
        """(K, G, d, n), as they are."""
        if self._blocks is None:
            self._blocks = as_blocks(self.x, self.geometry.sizes[1], self.geometry.last)
        return self._blocks

    def read(self, piece: Piece, slot: int = 0) -> Tensor:
        """The piece itself where nothing is to be done to it, else a copy in the scratch buffer of this slot.

        On the CPU the next reading with the same slot overwrites the copy.
        """
        if self.whole is not None:
            return self.whole
        if self._as_it_is and not piece.joined:
            return piece.of(self.blocks).flatten(0, 1)
        if self._last is not None and self._last[0] == piece:
            return self._last[1]
        part = piece.of(self.blocks)
        buffer = scratch_buffer(part, self.geometry.dtype, slot, contiguous=piece.joined)
        if self.origin is None:
            buffer.copy_(part)
        else:
            origin = self.origin.unsqueeze(-1) if piece.joined else self.origin
            if part.dtype == self.geometry.dtype or not self.geometry.on_cpu:
                torch.sub(part, origin, out=buffer)
            else:
                buffer.copy_(part).sub_(origin)
        copy = buffer.flatten(2) if piece.joined else buffer.flatten(0, 1)
        if not self.geometry.on_cpu:
            self._last = piece, copy
        return copy

    def sum(self) -> Tensor:
        """Σ over samples, (G, d, 1), in the working dtype."""
        on_cpu, dtype, (_, G, d, _) = self.geometry.on_cpu, self.geometry.dtype, self.geometry.sizes
        if self.whole is not None and self.geometry.small:
            if G == 1:
                return self.whole.sum((0, 2)).view(1, d, 1)
            return self.whole.view(self.geometry.sizes).sum((0, 3)).unsqueeze(-1)
        if self.origin is None and (self._as_it_is or not on_cpu):
            # On large maps twice as fast in this order as over both at once.
            if on_cpu and not self.geometry.small:
                return self.blocks.sum(3).sum(0).unsqueeze(-1)
            return self.blocks.sum((0, 3), dtype=dtype).unsqueeze(-1)
        total: Tensor | None = None
        for piece in self.geometry.pieces:
            part = self.read(piece)
            part = part.sum(-1) if piece.joined else part.view(-1, G, d, part.shape[-1]).sum((0, 3))
            total = part if total is None else total.add_(part)
        return (self.x.new_zeros(G, d, dtype=dtype) if total is None else total).unsqueeze(-1)

    def mean(self) -> Tensor:
        """The mean over samples, (G, d, 1), of which there is one at least."""
        if self.whole is not None and self.geometry.small and self.geometry.sizes[1] == 1:
            return self.whole.mean((0, 2), keepdim=True)
        return self.sum().div_(self.geometry.count)


# A matrix a group (G, d, d), and the activations that it multiplies.
Term = tuple[Tensor, Samples]


def affine(start: Tensor | None, *terms: Term, scale: float = 1.0) -> Tensor:
    """start + A₁ B₁ + scale · A₂ B₂, start (G, d, 1) by groups, as activations in the layout and dtype of B₁."""
    samples = terms[0][1]
    K, G, _, _ = samples.geometry.sizes
    # Activations of one geometry are all read alike, or the first of them as they are and the others are small copies.
    out = new_like(samples.x, samples.geometry.last)
    if samples.whole is None or terms[-1][1].whole is None or samples.x.dtype != samples.geometry.dtype:
        _write(as_blocks(out, G, samples.geometry.last), start, terms, scale)
        return out
    # Written through a view: of what an autograd function returns, a view refuses the in-place operation behind it.
    total = out.view(samples.whole.shape)
    for index, (A, B) in enumerate(terms):
        A = A.expand(K, -1, -1) if G == 1 else _per_image(A, samples.geometry)
        if index:
            total.baddbmm_(A, B.whole, alpha=scale)  # pyright: ignore[reportArgumentType]
        elif start is not None:
            start = start if G == 1 else _per_image(start, samples.geometry)
            torch.baddbmm(start, A, B.whole, out=total)  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            torch.bmm(A, B.whole, out=total)  # pyright: ignore[reportArgumentType]
    return out


def _write(out: Tensor, start: Tensor | None, terms: tuple[Term, ...], scale: float) -> None:
    """The same written to ``out`` (K, G, d, n), piece by piece."""
    geometry = terms[0][1].geometry
    start = None if start is None else _per_image(start, geometry)
    factors = [(_per_image(A, geometry), B) for A, B in terms]
    # Along the samples the product adds the start at no cost; across short rows of channels it is added later.
    along = out.stride(-1) == 1
    for piece in geometry.pieces:
        target = piece.of(out)
        into = target
        if piece.joined or out.dtype != geometry.dtype:
            into = scratch_buffer(target, geometry.dtype, len(terms), contiguous=piece.joined)
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


def _per_image(groupwise: Tensor, geometry: Geometry) -> Tensor:
    """One matrix or vector a group, (G, …), repeated for every image of the longest piece: (k·G, …).

    One group is not copied.
    """
    longest = geometry.pieces[0] if geometry.pieces else None
    if longest is None or longest.axis != 0 or longest.joined or longest.length == 1:
        return groupwise
    return groupwise.expand(longest.length, *groupwise.shape).flatten(0, 1)


def sum_of_products(left: Samples, right: Samples, scale: float = 1.0) -> Tensor:
    """scale · Σ A Bᵀ over all samples, by groups: (G, d, d)."""
    K, G, d, _ = left.geometry.sizes
    half = d // 2 if right is left and d >= HALVED and left.geometry.on_cpu else 0
    if not half and left.whole is not None and right.whole is not None and left.geometry.on_cpu:
        total = torch.bmm(left.whole, right.whole.mT)
        if K > 1:
            total = total.sum(0, keepdim=True) if G == 1 else total.view(K, G, d, d).sum(0)
        return total if scale == 1.0 else total.mul_(scale)
    total = None
    for piece in left.geometry.pieces:
        A = left.read(piece, 0)
        B = A if right is left else right.read(piece, 1)
        if total is None:  # the first piece has as many matrices as any
            if half:
                total = A.new_zeros(A.shape[0], d, d)
            else:
                total = torch.baddbmm(_nothing(A), A, B.mT, beta=0, alpha=scale)
                continue
        into = total[: A.shape[0]]
        if half:
            into[:, :half].baddbmm_(A[:, :half], B.mT, alpha=scale)
            into[:, half:, half:].baddbmm_(A[:, half:], B[:, half:].mT, alpha=scale)
        else:
            into.baddbmm_(A, B.mT, alpha=scale)
    if total is None:
        return left.x.new_zeros(G, d, d, dtype=left.geometry.dtype)
    if total.shape[0] != G:
        total = total.view(-1, G, d, d).sum(0)
    if half:
        total[:, half:, :half] = total[:, :half, half:].mT
    return total


def _nothing(A: Tensor) -> Tensor:
    """An empty tensor, to be added with the factor 0."""
    return A.new_empty(1, 1, 1)
