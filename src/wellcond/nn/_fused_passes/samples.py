"""Activations as they are read for sums and products."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry, Piece
from .layout import is_intact, scratch_buffer


class Samples:
    """Activations to be read piece by piece in the working dtype, minus an origin (G, d, 1) if there is one.

    Attributes:
        x: (N, C, *spatial), in the layout of the geometry if it is to be read without a copy.
        whole: (K·G, d, n) if everything is one piece that needs no conversion or is small, else None.
    """

    def __init__(self, x: Tensor, geometry: Geometry, origin: Tensor | None = None) -> None:
        self.x, self.geometry, self.origin = x, geometry, origin
        as_it_is = self._as_it_is = origin is None and x.dtype == geometry.dtype
        self.whole: Tensor | None = None
        if geometry.at_once and (as_it_is or geometry.small):
            K, G, d, n = geometry.sizes
            if as_it_is:
                self.whole = x.reshape(K * G, d, n)
            elif origin is None:
                self.whole = x.reshape(K * G, d, n).to(geometry.dtype)
            elif G == 1:
                self.whole = x.reshape(K, d, n) - origin
            else:
                self.whole = (x.reshape(K, G, d, n) - origin).reshape(K * G, d, n)
        self._blocks: Tensor | None = None
        # The last copy: of which piece, and in which slot. It is read again unless it was overwritten; not through
        # another slot, where the next reading would overwrite it while it is in use.
        self._last: tuple[Piece, Tensor, int] | None = None

    @property
    def blocks(self) -> Tensor:
        """(K, G, d, n), as they are."""
        if self._blocks is None:
            self._blocks = self.geometry.blocks(self.x)
        return self._blocks

    def read(self, piece: Piece, slot: int = 0) -> Tensor:
        """The piece itself where nothing is to be done to it, else a copy in the scratch buffer of this slot.

        On the CPU the next copy in the same slot, of whatever samples, overwrites this one.
        """
        if self.whole is not None:
            return self.whole
        if self._as_it_is and not piece.joined:
            return piece.of(self.blocks).flatten(0, 1)
        slot = slot if self.geometry.on_cpu else 0  # there is no scratch buffer elsewhere
        if self._last is not None:
            last, copy, where = self._last
            if last is piece and where == slot and is_intact(copy, slot):
                return _flat(piece, copy)
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
        self._last = (piece, buffer, slot) if is_intact(buffer, slot) else None
        return _flat(piece, buffer)

    def sum(self) -> Tensor:
        """Σ over samples, (G, d, 1), in the working dtype."""
        # A single joined piece is copied once, and read again for the products.
        joined = self.geometry.on_cpu and len(self.geometry.pieces) == 1 and self.geometry.pieces[0].joined
        return self._sum(as_they_lie=not joined)

    def mean(self) -> Tensor:
        """The mean over samples, (G, d, 1), of which there is one at least."""
        if self.whole is not None and self.geometry.small and self.geometry.sizes[1] == 1:
            return self.whole.mean((0, 2), keepdim=True)
        # Products are of samples about an origin: without one, a copy would serve this sum alone.
        return self._sum(as_they_lie=True).div_(self.geometry.count)

    def _sum(self, *, as_they_lie: bool) -> Tensor:
        on_cpu, dtype, (_, G, d, _) = self.geometry.on_cpu, self.geometry.dtype, self.geometry.sizes
        if self.whole is not None and self.geometry.small:
            if G == 1:
                return self.whole.sum((0, 2), keepdim=True)
            return self.whole.view(self.geometry.sizes).sum((0, 3)).unsqueeze(-1)
        if as_they_lie and self.origin is None and (self._as_it_is or not on_cpu):
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


def _flat(piece: Piece, part: Tensor) -> Tensor:
    """(k·G, d, n), or (G, d, k·n) if joined, of what ``piece.of`` gives."""
    return part.flatten(2) if piece.joined else part.flatten(0, 1)
