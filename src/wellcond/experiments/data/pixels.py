"""One image from its file to 8 bits a channel, upright and of the size that is asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from wellcond.experiments.errors import needs_train_extra

with needs_train_extra():
    from PIL import Image, ImageOps

T = TypeVar("T")

BILINEAR = Image.Resampling.BILINEAR

MOST_PIXELS = 1 << 30
"""Of one image: 4 GB when it is decoded. Pillow's own limit, 179 million, would refuse scans and aerial photographs."""


def opened(data: bytes, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of the image in an encoded file, turned upright as its EXIF says.

    It is decoded only if `use` looks at the pixels.

    Raises:
        Exception: of any kind (OSError, SyntaxError, ValueError, struct.error, …), where it cannot be decoded.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # it warns above that, and refuses above twice as many
    try:
        image = Image.open(io.BytesIO(data))
        return use(ImageOps.exif_transpose(image) if image.info.get("exif") else image)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def size(image: Image.Image) -> tuple[int, int]:
    """(H, W)."""
    return image.height, image.width


def mode(image: Image.Image) -> str:
    """As Pillow names it. Floats are refused: of what to what do they go?"""
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floats; save them as integers of 8 or 16 bits")
    return image.mode


def fitted(image: Image.Image, size: tuple[int, int], share: float = 1.0) -> Image.Image:
    """The middle of the image in the proportions of (H, W), so much of what fits into it, scaled to (H, W)."""
    return ImageOps.fit(image, (size[1], size[0]), BILINEAR, bleed=(1 - share) / 2)


def channels(modes: Iterable[str]) -> int:
    """1 for images of these modes if all are grey, else 3."""
    return 1 if all(mode in ("1", "L", "LA", "La") or mode.startswith("I") for mode in modes) else 3


def grey_bits(image: Image.Image) -> int:
    """The bits that hold the largest grey of an image of more than 8 bits a pixel; 8 for every other."""
    return max(8, int(_deep(image).max()).bit_length()) if image.mode.startswith("I") else 8


def eight_bits(image: Image.Image, channels: int, bits: int) -> Image.Image:
    """Grey (1 channel) or RGB of 8 bits; of greys with more, the uppermost 8 of so many `bits`."""
    if mode(image).startswith("I"):
        image = Image.fromarray(np.minimum(_deep(image) >> (bits - 8), 255).astype(np.uint8))
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)  # which would copy


def _deep(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError(f"it has pixels below zero, {values.min()}; save it with greys from 0 on")
    return values
