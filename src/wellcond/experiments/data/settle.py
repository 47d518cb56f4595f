"""The last step of loading: one shape for the images of all splits, decoded now or on access."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wellcond.experiments.data import crops, pixels
from wellcond.experiments.data.encoded import EncodedImages
from wellcond.experiments.data.images import Areas, ImageSet, mapped

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 1000  # images decoded at once


def settle(
    sets: Sequence[ImageSet], image_size: int | None, memory_budget: int, *, areas: bool = False
) -> tuple[list[ImageSet], list[str]]:
    """Bring several sets to one image shape, and decode them into memory if together they fit `memory_budget` bytes.

    With ``areas`` the first set provides random areas of its original images, decoded into memory only if all have one
    size, and the other sets provide centre crops.

    Decoding takes about 0.1 ms per 32×32 image. Threads do not help for such small images, as Pillow holds the GIL most
    of the time; worker processes of the loader help for images decoded on access.

    Returns:
        The sets, and notes on the conversion of pixels.

    Raises:
        DataError: images differ in size and `image_size` is None, or one cannot be decoded.
    """
    encoded = [s.images for s in sets if isinstance(s.images, EncodedImages)]
    if not encoded:
        return [_of_arrays(s, image_size, areas, first=s is sets[0]) for s in sets], []
    headers = [dict.fromkeys(found for _, found in i.read(torch.arange(len(i.index)), _header)) for i in encoded]
    modes = {mode for found in headers for mode, _ in found}
    channels, (bits, notes) = pixels.channels(modes), grey_depth(encoded, modes)
    first_size = next(iter(headers[0]))[1]
    size = (image_size, image_size) if image_size else first_size
    share = None if image_size is None else crops.SHARE if areas else 1.0
    shaped = [replace(i, channels=channels, bits=bits, size=size, share=share) for i in encoded]
    if areas:  # areas are taken from the original training images
        shaped[0] = replace(shaped[0], size=first_size, share=None)
    one_size = not areas or len({size for _, size in headers[0]}) == 1
    decodable = shaped if one_size else shaped[1:]
    fits = sum(math.prod(images.shape) for images in decodable) <= memory_budget
    settled = []
    for images, labels in zip(shaped, (s.labels for s in sets), strict=True):
        for_areas = areas and images is shaped[0]
        in_memory = fits and (one_size or not for_areas)
        if not in_memory and images.share is None and not areas:
            images.check_sizes()  # now, rather than during training
        source = _decoded(images) if in_memory else images
        settled.append(ImageSet(Areas(source, size[0]) if for_areas else source, labels))
    return settled, notes


def _header(image: Image.Image) -> tuple[str, tuple[int, int]]:
    return pixels.mode(image), pixels.size(image)


def _decoded(images: EncodedImages) -> Tensor:
    """All images in memory, decoded in chunks to bound the peak."""
    out = torch.empty(images.shape, dtype=torch.uint8)
    for chunk in torch.arange(len(out)).split(_CHUNK):
        out[chunk[0] : chunk[-1] + 1] = images[chunk]
    return out


def _of_arrays(images: ImageSet, image_size: int | None, areas: bool, *, first: bool) -> ImageSet:
    """Images given as arrays, resized to `image_size` like files."""
    assert isinstance(images.images, Tensor)
    if image_size is None:
        return images
    if areas and first:
        return ImageSet(Areas(images.images, image_size), images.labels)
    share = crops.SHARE if areas else 1.0
    return ImageSet(
        mapped(images.images, lambda image: pixels.fitted(image, (image_size, image_size), share)).contiguous(),
        images.labels,
    )


def grey_depth(
    sets: Sequence[EncodedImages], modes: Iterable[str], broken: list[str] | None = None
) -> tuple[int, list[str]]:
    """The bits used by greyscale images with more than 8, from a sample of each set, and a note on it."""
    if not any(mode.startswith("I") for mode in modes):
        return 8, []
    found = (bits for images in sets for _, bits in images.read(images.spread(), pixels.grey_bits, broken))
    bits = max(found, default=8)
    return bits, [f"greys of {bits} bits: the uppermost 8 are used"] if bits > 8 else []
