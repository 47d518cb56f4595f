"""The area of a photograph that a network sees: a random one in training, the middle in a test.

As in the literature on ImageNet since Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6: an area
of 8 to 100 % of the image whose width is 3/4 to 4/3 of its height, brought to the size of the network by the bilinear
filter. A test scales the shorter side to 256 for networks of 224 and sees the middle; here it does so for any size in
the same proportion, in one step, without rounding in between.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from wellcond.experiments.data import pixels
from wellcond.experiments.data.draws import mixed_seed

if TYPE_CHECKING:
    from PIL import Image

SHARE = 224 / 256
"""The part of the shorter side that a test sees."""

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge, in pixels."""


def middle(image: Image.Image, size: int) -> Image.Image:
    """What a test sees, size × size."""
    return pixels.fitted(image, (size, size), SHARE)


def random_area(image: Image.Image, size: int, *key: int) -> Image.Image:
    """A random area, brought to size × size; it depends on the image's size and on `key` (non-negative) alone."""
    box = random_box(image.width, image.height, np.random.default_rng(mixed_seed(*key)))
    # Cut out first, as in the literature: the filter of `resize(box=…)` reaches over the edges.
    return image.crop(box).resize((size, size), pixels.BILINEAR)


def random_box(width: int, height: int, draws: np.random.Generator) -> Box:
    """The edges of a random area, in whole pixels.

    Its share of the image is uniform on `SCALE`, the logarithm of its ratio on that of `RATIO`, its place on all that
    are left. One that does not fit is drawn again, up to ten times; then it is the largest middle with a ratio allowed.
    """
    share = draws.uniform(*SCALE, _TRIES) * width * height
    root = np.sqrt(np.exp(draws.uniform(math.log(RATIO[0]), math.log(RATIO[1]), _TRIES)))
    side = np.sqrt(share)
    widths, heights = np.rint(side * root).astype(int), np.rint(side / root).astype(int)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        w, h = int(widths[first]), int(heights[first])
        left, upper = int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1))
    else:
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, upper = (width - w) // 2, (height - h) // 2
    return (left, upper, left + w, upper + h)
