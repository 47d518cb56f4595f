"""The last step of loading: one shape for the images of all splits, and whether they are decoded now or when read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wellcond.experiments.data import crops, pixels
from wellcond.experiments.data.encoded import EncodedImages
from wellcond.experiments.data.images import Areas, ImageSet, made_of

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 1000  # images decoded at once


def settle(
    sets: Sequence[ImageSet], image_size: int | None, memory_budget: int, *, areas: bool = False
) -> tuple[list[ImageSet], list[str]]:
    """Give several sets one image shape, and decode them into memory if together they fit `memory_budget` bytes.

    With ``areas`` the first set gives random areas of its images, as they are in the files: decoded into memory only
    where all have one size; and the others give the middle as tests see it.

    Decoding takes about 0.1 ms an image of 32×32; threads do not help images this small (Pillow holds the
    interpreter's lock for most of that time), worker processes of the loader do for what is decoded later.

    Returns:
        The sets, and notes on what was done to the pixels.

    Raises:
        DataError: images differ in size and `image_size` is None, or one cannot be decoded.
    """
    encoded = [s.images for s in sets if isinstance(s.images, EncodedImages)]
    if not encoded:
        return [_of_arrays(s, image_size, areas, first=s is sets[0]) for s in sets], []
    headers = [dict.fromkeys(seen for _, seen in i.read(torch.arange(len(i.index)), _header)) for i in encoded]
    modes = {mode for found in headers for mode, _ in found}
    channels, (bits, notes) = pixels.channels(modes), grey_depth(encoded, modes)
    first_size = next(iter(headers[0]))[1]
    size = (image_size, image_size) if image_size else first_size
    share = None if image_size is None else crops.SHARE if areas else 1.0
    told = [replace(i, channels=channels, bits=bits, size=size, share=share) for i in encoded]
    if areas:  # the training images stay as they are
        told[0] = replace(told[0], size=first_size, share=None)
    one_size = not areas or len({size for _, size in headers[0]}) == 1
    kept = told if one_size else told[1:]
    fits = sum(math.prod(images.shape) for images in kept) <= memory_budget
    settled = []
    for images, labels in zip(told, (s.labels for s in sets), strict=True):
        inside = fits and (one_size or images is not told[0])
        if not inside and images.share is None and not areas:
            images.check_sizes()  # now, rather than in the middle of the training
        source = _decoded(images) if inside else images
        settled.append(ImageSet(Areas(source, size[0]) if areas and images is told[0] else source, labels))
    return settled, notes


def _header(image: Image.Image) -> tuple[str, tuple[int, int]]:
    return pixels.mode(image), pixels.size(image)


def _decoded(images: EncodedImages) -> Tensor:
    """All of them in memory, of which they take no more than that on the way."""
    out = torch.empty(images.shape, dtype=torch.uint8)
    for chunk in torch.arange(len(out)).split(_CHUNK):
        out[chunk[0] : chunk[-1] + 1] = images[chunk]
    return out


def _of_arrays(images: ImageSet, image_size: int | None, areas: bool, *, first: bool) -> ImageSet:
    """Images in memory, brought to a square of `image_size` by the same rule as files."""
    assert isinstance(images.images, Tensor)
    if image_size is None:
        return images
    if areas and first:
        return ImageSet(Areas(images.images, image_size), images.labels)
    share = crops.SHARE if areas else 1.0
    return ImageSet(
        made_of(images.images, lambda image: pixels.fitted(image, (image_size, image_size), share)).contiguous(),
        images.labels,
    )


def grey_depth(
    sets: Sequence[EncodedImages], modes: Iterable[str], broken: list[str] | None = None
) -> tuple[int, list[str]]:
    """The bits that greys of more than 8 have in use, told from some images of each set; and a note on that."""
    if not any(mode.startswith("I") for mode in modes):
        return 8, []
    found = (bits for images in sets for _, bits in images.read(images.spread(), pixels.grey_bits, broken))
    bits = max(found, default=8)
    return bits, [f"greys of {bits} bits: the uppermost 8 are used"] if bits > 8 else []
