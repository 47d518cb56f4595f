"""An overview of a data set: the output of `wellcond data`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wellcond.experiments.data import pixels
from wellcond.experiments.data.encoded import EncodedImages
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import MEMORY_BUDGET, check_size, for_training
from wellcond.experiments.data.settle import grey_depth
from wellcond.experiments.data.sources import open_source
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_MAX_SHOWN = 5


@dataclass(frozen=True)
class Overview:
    """Images by split and class, their sizes and modes, and what was skipped or prevents training."""

    name: str
    classes: tuple[str, ...]
    counts: dict[str, list[int]]  # images per class, by split
    sizes: Counter[tuple[int, int]]  # (H, W)
    modes: Counter[str]  # as Pillow names them
    notes: tuple[str, ...]  # what was skipped and why
    broken: tuple[str, ...]  # messages about unreadable images
    training: tuple[str, ...]  # decisions for training
    trouble: str  # what prevents training, or empty

    def lines(self) -> list[str]:
        """Everything except the counts, as lines."""
        sizes = [f"{height}×{width} ({n})" for (height, width), n in self.sizes.most_common(_MAX_SHOWN)]
        if len(self.sizes) > _MAX_SHOWN:
            heights, widths = (f"{min(side)} to {max(side)}" for side in zip(*self.sizes, strict=True))
            sizes.append(f"… {len(self.sizes)} sizes, {heights} high, {widths} wide")
        broken = [f"broken: {message}" for message in self.broken[:_MAX_SHOWN]]
        if len(self.broken) > _MAX_SHOWN:
            broken.append(f"broken: {len(self.broken) - _MAX_SHOWN} more")
        return [
            f"sizes, height×width: {', '.join(sizes)}",
            f"modes: {', '.join(f'{mode} ({n})' for mode, n in self.modes.most_common())}",
            *self.notes,
            *broken,
            *self.training,
        ]


def overview(source: str | Path | Any, *, image_size: int | None = None, decode: bool = False) -> Overview:
    """An overview of any source that `load_images` accepts, and of how it would be loaded.

    Args:
        image_size: bring all images to this height and width, as in `load_images`.
        decode: decode every image; otherwise only headers are read, and truncated images are not noticed.

    Raises:
        DataError: an unknown or unreachable source, one without labelled images, or an ambiguous one.
    """
    check_size(image_size)
    found = open_source(source)
    sizes, modes, broken, training = Counter[tuple[int, int]](), Counter[str](), list[str](), list[str]()
    for images in found.splits.values():
        for size, mode in _headers(images, decode, broken):
            sizes[size] += 1
            modes[mode] += 1
    encoded = [s.images for s in found.splits.values() if isinstance(s.images, EncodedImages)]
    _, deep = grey_depth(encoded, modes, [])
    try:
        splits, decided = for_training(found)
        counts = ", ".join(f"{split} {len(splits[split])}" for split in ("train", "validation", "test"))
        training += [*decided, *deep, f"for training: {counts}; {_pixels(sizes, modes, image_size)}"]
        some, them = ("1 image", "it") if len(broken) == 1 else (f"{len(broken)} images", "them")
        trouble = f"{some} cannot be read; replace or remove {them}" if broken else ""
    except DataError as error:
        trouble = str(error)
    return Overview(
        name=found.name,
        classes=found.classes,
        counts={s: i.labels.bincount(minlength=len(found.classes)).tolist() for s, i in found.splits.items()},
        sizes=sizes,
        modes=modes,
        notes=found.notes,
        broken=tuple(broken),
        training=tuple(training),
        trouble=trouble,
    )


def _headers(images: ImageSet, decode: bool, broken: list[str]) -> list[tuple[tuple[int, int], str]]:
    """Size and mode of each readable image."""

    def header(image: Image.Image) -> tuple[tuple[int, int], str]:
        found = pixels.size(image), pixels.mode(image)
        if decode:
            pixels.eight_bits(image, 3, 8).load()
        return found

    if isinstance(images.images, EncodedImages):
        return [found for _, found in images.images.read(torch.arange(len(images)), header, broken)]
    _, channels, height, width = images.images.shape
    return [((height, width), "L" if channels == 1 else "RGB")] * len(images)


def _pixels(sizes: Counter[tuple[int, int]], modes: Counter[str], image_size: int | None) -> str:
    """The shape of all images after loading, and when they are decoded."""
    if len(sizes) > 1 and image_size is None:
        return "the images differ in size: bring all of them to N×N by --image-size N"
    from rich.filesize import decimal

    height, width = (image_size, image_size) if image_size else next(iter(sizes), (0, 0))
    channels = pixels.channels(modes)
    needed = sizes.total() * channels * height * width
    where = "in memory" if needed <= MEMORY_BUDGET else "decoded when read"
    return f"{channels}×{height}×{width}, {decimal(needed)}, {where}"
