"""How activations are cut into pieces that fit a processor's cache.

A piece is still in the cache from one operation to the next, so that subtracting an origin, converting half precision
and adding a second product cost little, and large activations are never copied as a whole. Small activations, and those
on other devices, are one piece: there the overhead of an operation exceeds its memory traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.precision import working_dtype

from .layout import LARGEST_KEPT, as_blocks, block_sizes, channels_last

# Entries of one piece: 1 MB in float32.
CACHED_ENTRIES = 1 << 18
# Of a joined piece, which is copied anyway: one wide product is faster.
JOINED_ENTRIES = LARGEST_KEPT
# Samples of a joined piece: single precision rounds a sum of more by more than a sum of such sums.
JOINED_SAMPLES = 1 << 13
# Off the CPU a piece only bounds the memory of its copy, to an eighth of the activations or 64 MB in float32: few large
# kernels are faster.
PIECES_ELSEWHERE = 8
ENTRIES_ELSEWHERE = 1 << 24
# Number of entries up to which the overhead of an operation on the CPU exceeds its memory traffic.
SMALL = 1 << 15
# On the CPU, products of images of fewer pixels, one by one, take up to a fifth longer than a copy of them side by side
# and one product, if the matrices are larger than that.
FEW_PIXELS = 64


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
        whole = self.length == blocks.shape[self.axis]
        piece = blocks if whole else blocks.narrow(self.axis, self.start, self.length)
        return piece.permute(1, 2, 0, 3) if self.joined else piece


@dataclass(frozen=True)
class Geometry:
    """How activations of one shape are processed.

    Attributes:
        sizes: (K, G, d, n) of the blocks, see :mod:`.layout`.
        last: whether their channels are the innermost in memory.
        dtype: of the computation.
        on_cpu: whether they are on the CPU.
        count: K·n samples.
        pieces: what they are cut into, along K or, for a single block, n; the first is the longest.
        at_once: whether they are one piece that is not joined.
        small: whether overhead dominates, see :data:`SMALL`.
    """

    sizes: tuple[int, int, int, int]
    last: bool
    dtype: torch.dtype
    on_cpu: bool
    count: int
    pieces: tuple[Piece, ...]
    at_once: bool
    small: bool

    def blocks(self, x: Tensor) -> Tensor:
        """``as_blocks`` of activations of this geometry."""
        return as_blocks(x, self.sizes[1], True) if self.last else x.reshape(self.sizes)


def geometry_of(x: Tensor, groups: int) -> Geometry:
    """The geometry of activations (N, C, *spatial)."""
    return _geometry(x.shape, groups, channels_last(x), working_dtype(x.dtype), x.device.type == "cpu")


@lru_cache(1024)
def _geometry(shape: torch.Size, groups: int, last: bool, dtype: torch.dtype, on_cpu: bool) -> Geometry:
    sizes = K, _, _, n = block_sizes(shape, groups, last)
    pieces = cut(*sizes, on_cpu)
    at_once = len(pieces) == 1 and not last and not pieces[0].joined
    return Geometry(sizes, last, dtype, on_cpu, K * n, pieces, at_once, on_cpu and math.prod(shape) <= SMALL)


def cut(K: int, G: int, d: int, n: int, on_cpu: bool) -> tuple[Piece, ...]:
    """Cut (K, G, d, n) into pieces of about :data:`CACHED_ENTRIES` entries; an empty tensor has none."""
    numel = K * G * d * n
    if not numel:
        return ()
    axis, total = (0, K) if K > 1 else (3, n)
    joined = K > 1 and (n < min(d, FEW_PIXELS) if on_cpu else 4 * n <= d)
    limit = JOINED_ENTRIES if joined else CACHED_ENTRIES
    if not on_cpu:
        limit = max(ENTRIES_ELSEWHERE, numel // PIECES_ELSEWHERE)
    # Unless joined, a piece along K also yields a d × d matrix per image and group.
    entries = numel * (max(n, d) / n if K > 1 and not joined else 1)
    step = int(limit * total / entries)
    if joined and on_cpu:
        step = min(step, JOINED_SAMPLES // n)
    step = max(1, step)
    return tuple(Piece(axis, start, min(step, total - start), joined) for start in range(0, total, step))
