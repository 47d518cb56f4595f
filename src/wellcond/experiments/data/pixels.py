"""Single images: decoding, orientation, conversion to 8 bits per channel, and resizing."""

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
"""Per image, 4 GB when decoded. Pillow's limit of 179 million would reject scans and aerial photographs."""


def opened(source: str | bytes, use: Callable[[Image.Image], T]) -> T:
    """Apply `use` to an encoded image (its path or its bytes), rotated according to its EXIF orientation.

    It is decoded only if `use` accesses the pixels. By its path Pillow mostly needs less time than from its bytes: 6 to
    12 % in four of five processes, with JPEGs of 256×256.

    Raises:
        Exception: of any type (OSError, SyntaxError, ValueError, struct.error, …) if it cannot be decoded.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow warns above this, and raises above twice this
    try:
        with Image.open(source if not isinstance(source, bytes) else io.BytesIO(source)) as image:
            return use(ImageOps.exif_transpose(image) if image.info.get("exif") else image)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def size(image: Image.Image) -> tuple[int, int]:
    """(H, W)."""
    return image.height, image.width


def mode(image: Image.Image) -> str:
    """Pillow's name of the mode. Float images are rejected, as their range is unknown."""
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floats; save them as integers of 8 or 16 bits")
    return image.mode


def fitted(image: Image.Image, size: tuple[int, int], share: float = 1.0) -> Image.Image:
    """The centre crop with the aspect ratio of (H, W), covering `share` of the largest one, resized to (H, W)."""
    return ImageOps.fit(image, (size[1], size[0]), BILINEAR, bleed=(1 - share) / 2)


def channels(modes: Iterable[str]) -> int:
    """1 if all these modes are greyscale, else 3."""
    return 1 if all(mode in ("1", "L", "LA", "La") or mode.startswith("I") for mode in modes) else 3


def grey_bits(image: Image.Image) -> int:
    """The bits needed for the largest grey level of an image with more than 8 bits per pixel; otherwise 8."""
    return max(8, int(_deep(image).max()).bit_length()) if image.mode.startswith("I") else 8


def eight_bits(image: Image.Image, channels: int, bits: int) -> Image.Image:
    """8-bit greyscale (1 channel) or RGB; of deeper greyscale images, the upper 8 of `bits` bits."""
    if mode(image).startswith("I"):
        image = Image.fromarray(np.minimum(_deep(image) >> (bits - 8), 255).astype(np.uint8))
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)  # convert() always copies


def _deep(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError(f"it has pixels below zero, {values.min()}; save it with greys from 0 on")
    return values
