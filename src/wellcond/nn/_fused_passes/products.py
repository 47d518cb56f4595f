"""Affine maps of activations, and sums of their outer products, piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry
from .layout import new_like, scratch_buffer
from .samples import Samples

# On the CPU, from this matrix size on, only one of the two off-diagonal quarters of a symmetric product is computed.
HALVED = 256

# A matrix a group (G, d, d), and the activations that it multiplies.
Term = tuple[Tensor, Samples]


def affine(start: Tensor | None, *terms: Term, scale: float = 1.0) -> Tensor:
    """start + A₁ B₁ + scale · A₂ B₂, start (G, d, 1) by groups, as activations in the layout and dtype of B₁."""
    samples = terms[0][1]
    K, G, _, _ = samples.geometry.sizes
    # Activations of one geometry are all read alike, or the first of them as they are and the others are small copies.
    out = new_like(samples.x, samples.geometry.last)
    if samples.whole is None or terms[-1][1].whole is None or samples.x.dtype != samples.geometry.dtype:
        _write(samples.geometry.blocks(out), start, terms, scale)
        return out
    # Written through a view: of what an autograd function returns, a view refuses the in-place operation behind it.
    total = out.view(samples.whole.shape)
    for index, (A, B) in enumerate(terms):
        if K > 1:
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
