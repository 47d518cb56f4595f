"""Sprites: coloured shapes on black, drawn from known factors, for measuring what a generator's latents do.

In the manner of dSprites (Matthey et al., 2017), with a colour besides. The ranges of the factors are such that every
image has one set of factors: all shapes are longer than wide, so that they repeat at half a turn, and angles cover a
third of one; hues go from red to blue, not around.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHAPES = ("rectangle", "ellipse", "triangle")
RANGES = {
    "size": (0.5, 1.0),  # half of the longer axis is SIZE times this
    "angle": (-np.pi / 3, np.pi / 3),  # from upright, clockwise
    "x": (-0.4, 0.4),  # of the centre; the image is [-1, 1]², y downwards
    "y": (-0.4, 0.4),
    "hue": (0.0, 2 / 3),  # red, yellow, green, cyan, blue
}
"""The continuous factors, each uniform on its range."""
FACTORS = ("shape", *RANGES)
"""The names of the columns of the factors."""
SIZE, ASPECT = 0.6, 0.5
_PIXELS = 1 << 20  # drawn at once


class Sprites(NamedTuple):
    """Images (N, 3, size, size) uint8, and their factors (N, 6) float64 in the order of ``FACTORS``."""

    images: Tensor
    factors: Tensor


def sprite_factors(count: int, seed: int = 0) -> Tensor:
    """(count, 6) float64: independent, uniform factors; row i depends on i and the seed alone.

    The shape is the index in ``SHAPES``, the others are in the units of ``RANGES``.

    Raises:
        ValueError: a negative count or seed.

    Example:
        >>> bool((sprite_factors(3) == sprite_factors(100)[:3]).all())
        True
    """
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got {count} and {seed}")
    uniform = np.random.default_rng(seed).random((count, len(FACTORS)))
    columns = [np.floor(uniform[:, 0] * len(SHAPES))]
    columns += [low + (high - low) * u for u, (low, high) in zip(uniform.T[1:], RANGES.values(), strict=True)]
    return torch.from_numpy(np.stack(columns, 1))


def draw_sprites(factors: Tensor, size: int = 32) -> Tensor:
    """The images (N, 3, size, size) uint8 of factors (N, 6); an image depends on its own factors alone.

    Edges are smoothed over one pixel, so that a sprite moves by less than a pixel.

    Raises:
        ValueError: factors of another shape, an unknown shape of sprite, or a size below 8.

    Complexity: O(size²) an image.
    """
    if factors.ndim != 2 or factors.shape[1] != len(FACTORS):
        raise ValueError(f"factors must be (N, {len(FACTORS)}): {', '.join(FACTORS)}; got {tuple(factors.shape)}")
    if size < 8:
        raise ValueError(f"size must be at least 8, got {size}")
    if not torch.isin(factors[:, 0], torch.arange(len(SHAPES), dtype=factors.dtype)).all():
        raise ValueError(f"the shape must be 0 to {len(SHAPES) - 1}: {', '.join(SHAPES)}")
    images = torch.empty(len(factors), 3, size, size, dtype=torch.uint8)
    chunk = max(1, _PIXELS // size**2)
    for part, out in zip(factors.split(chunk), images.split(chunk), strict=True):
        out.copy_((255 * _drawn(part.double(), size)).round().to(torch.uint8))
    return images


def sprites(count: int, *, size: int = 32, seed: int = 0) -> Sprites:
    """Draw sprites with random factors: shape, size, angle, x, y and hue.

    ``load_images("sprites")`` has these images, 20,000 of seed 0 for training, 2,000 of seed 1 for validation and 4,000
    of seed 2 for testing, labelled by their shape.

    Args:
        count: how many; image i is the same whatever the count.
        size: height and width; the same factors give the same scene at any size.
        seed: of the factors.

    Returns:
        Images (count, 3, size, size) uint8 and factors (count, 6) float64: the index of the shape, the size, the angle
        in radians, x and y of the centre in halves of the image, and the hue as a fraction of a turn.

    Raises:
        ValueError: a negative count or seed, or a size below 8.

    Example:
        >>> images, factors = sprites(4, size=64)
        >>> images.shape, factors.shape
        (torch.Size([4, 3, 64, 64]), torch.Size([4, 6]))
    """
    factors = sprite_factors(count, seed)
    return Sprites(draw_sprites(factors, size), factors)


def _drawn(factors: Tensor, size: int) -> Tensor:
    """(N, 3, size, size) on [0, 1]."""
    shape, scale, angle, x, y, hue = factors.T[:, :, None, None]
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1
    across, down = centres - x, centres[:, None] - y
    u = (across * angle.cos() + down * angle.sin()) / (ASPECT * SIZE * scale)  # along the short axis, 1 at the edge
    v = (down * angle.cos() - across * angle.sin()) / (SIZE * scale)  # along the long one
    # The distance from the edge, positive inside, in units of the short half axis and to first order.
    length = torch.hypot(u / (ASPECT * SIZE * scale), v / (SIZE * scale)).clamp_min(1e-9)
    radius = torch.hypot(u, v)
    from_ellipse = torch.where(radius > 1e-9, (1 - radius) * radius / length, ASPECT * SIZE * scale)  # the centre
    inside = torch.stack(
        [
            torch.minimum((1 - u.abs()) * ASPECT, 1 - v.abs()) * SIZE * scale,
            from_ellipse,
            torch.minimum((1 - v) * SIZE, (1 + v - 2 * u.abs()) * SIZE * ASPECT / np.sqrt(4 + ASPECT**2)) * scale,
        ]
    )
    chosen = torch.gather(inside, 0, shape.long().expand(1, -1, size, size))[0]
    cover = (chosen * size / 2 + 0.5).clamp(0, 1)  # of the pixel
    return cover[:, None] * _rgb(hue[:, 0])[..., None]


def _rgb(hue: Tensor) -> Tensor:
    """(N, 3, 1) of full saturation and value."""
    turn = (hue * 6 + torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64)) % 6
    return ((turn - 3).abs() - 1).clamp(0, 1)[..., None]
