"""Crops of photographs: random areas in training, the centre for testing.

As usual for ImageNet since Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6: a random area of 8
to 100 % of the image with an aspect ratio of 3/4 to 4/3, resized with the bilinear filter. For testing the shorter side
is resized to 256 for 224-pixel networks, and the centre is cropped; here this is done for any size in the same
proportion, in one step without intermediate rounding.
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
"""The part of the shorter side in the centre crop."""

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge, in pixels."""


def middle(image: Image.Image, size: int) -> Image.Image:
    """The centre crop for testing, size × size."""
    return pixels.fitted(image, (size, size), SHARE)


def random_area(image: Image.Image, size: int, *key: int) -> Image.Image:
    """A random area resized to size × size; it depends only on the image's size and on `key` (non-negative)."""
    box = random_box(image.width, image.height, np.random.default_rng(mixed_seed(*key)))
    # Cropped first, as in the literature: the filter of `resize(box=…)` uses pixels outside the box.
    return image.crop(box).resize((size, size), pixels.BILINEAR)


def random_box(width: int, height: int, draws: np.random.Generator) -> Box:
    """The edges of a random area, in pixels.

    Its share of the image is uniform in `SCALE`, its aspect ratio log-uniform in `RATIO`, and its position uniform. An
    area that does not fit is redrawn up to ten times; after that it is the largest centre crop with a valid ratio.
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
