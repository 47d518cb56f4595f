"""Loading images from a name, a path or arrays.

Splits are made from the labels alone, before any image is decoded. The test split does not depend on the seed, so that
runs with different seeds are tested on the same images.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wellcond.experiments.data.draws import TEST_FRACTION, stratified_split
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.settle import settle
from wellcond.experiments.data.sources import open_source
from wellcond.experiments.data.tables import Source
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    import datasets

MEMORY_BUDGET = 2 << 30
_STATISTICS_IMAGES = 50_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Labelled images for training, validation and testing."""

    name: str  # of the source
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]  # their names, by label
    notes: tuple[str, ...] = ()  # decisions made while loading

    @property
    def in_channels(self) -> int:
        """1 or 3."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.train.images.shape[2], self.train.images.shape[3])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def flip(self) -> bool:
        """Whether mirror images keep their class; not if classes are single characters, such as digits."""
        return not all(len(name) == 1 for name in self.classes)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the pixels (0 to 255) of the training images, (C,) float32 each.

        From the histogram of up to 50,000 evenly spaced images, computed once. Constant channels get deviation 1.
        """
        return self._statistics

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        some = torch.linspace(0, len(self.train) - 1, min(len(self.train), _STATISTICS_IMAGES)).long()
        histogram = torch.zeros(self.in_channels, 256, dtype=torch.int64)
        for chunk in some.split(500):
            pixels = self.train.batch(chunk)[0]
            for channel, counts in enumerate(histogram):
                counts += torch.bincount(pixels[:, channel].flatten(), minlength=256)
        value, weight = torch.arange(256.0, dtype=torch.float64), histogram.double() / histogram.sum(1, keepdim=True)
        mean, square = weight @ value, weight @ value.square()
        std = (square - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 0, std, 1.0).float()


def load_images(
    source: str | Path | tuple[Any, Any] | datasets.DatasetDict,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    validation: float = 0.1,
    memory_budget: int = MEMORY_BUDGET,
    areas: bool = False,
) -> ImageData:
    """Load labelled images from any source, in splits for training, validation and testing.

    Args:
        source: `digits` (scikit-learn's, no network), `cifar10`, `cifar100`; any other name on the Hugging Face
            hub, `OWNER/NAME` or `OWNER/NAME:CONFIGURATION`; a path to a folder with parquet files in the hub's
            layout (`train-*.parquet`, …) or with images (`train/CLASS/*.png`, …, or `CLASS/*.png`), or to one
            parquet file; a pair (images, labels) of uint8 (N, C, H, W) and integers (N,); or a
            `datasets.DatasetDict`. A split is known by its exact name (`test`, `val`, …).
        image_size: bring every image to this height and width (shorter side scaled, middle cropped).
        limit: keep at most this many images of each split, in the proportions of the classes.
        seed: of the choice of validation images, and of those that `limit` keeps for training.
        validation: the fraction of the training images, stratified by class, that is set apart for choosing
            between results if the source has no validation split besides its test split.
        memory_budget: bytes up to which all images are decoded in advance; beyond, they are decoded on access.
        areas: train on random areas of the original images, which are decoded on access if they differ in size.
            Validation and test use the centre, 224/256 of the shorter side. Needs `image_size`.

    Returns:
        The images. Without a test split the validation split is used for testing; without both, a fifth of the training
        images is held out, independently of the seed. `notes` has this and what was skipped below a path; both are
        logged.

    Raises:
        DataError: an unknown or unreachable source, or one without labelled images; images that differ in size or
            cannot be decoded; too few images for the splits; areas without an image size.
        TypeError: an unsupported type of source.

    Example:
        >>> data = load_images("digits")
        >>> len(data.train), len(data.validation), len(data.test)
        (1294, 144, 359)
        >>> data.in_channels, data.image_size, data.num_classes
        (1, (8, 8), 10)
    """
    check_size(image_size)
    if areas and image_size is None:
        raise DataError("random areas need an image size, such as 224")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    if not 0 < validation < 1:
        raise DataError(f"validation must be a fraction between 0 and 1, got {validation}")
    found = open_source(source)
    splits, notes = for_training(found, validation, seed)
    if limit is not None:
        chosen = {"train": seed, "validation": seed, "test": 0}
        splits = {s: _limited(images, limit, chosen[s]) for s, images in splits.items()}
    parts = [splits[s] for s in ("train", "validation", "test")]
    (train, valid, test), done = settle(parts, image_size, memory_budget, areas=areas)
    notes = (*found.notes, *notes, *done)
    for note in notes if os.environ.get("RANK", "0") == "0" else ():  # under torchrun only rank 0 logs
        _log.warning("%s: %s", found.name, note)
    return ImageData(found.name, train, valid, test, found.classes, notes)


def check_size(image_size: int | None) -> None:
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")


def for_training(found: Source, validation: float = 0.1, seed: int = 0) -> tuple[dict[str, ImageSet], list[str]]:
    """The three splits for training, with missing ones held out as in `load_images`, and notes."""
    if len(found.classes) < 2:
        raise DataError(f"'{found.name}' has only one class, {found.classes}: there is nothing to classify")
    splits, notes = dict(found.splits), []
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no test split: the validation split is the test")
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(found.name, splits["train"], TEST_FRACTION, 0)
        notes.append(f"no test split: {len(splits['test'])} training images, stratified by class, are the test")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(found.name, splits["train"], validation, seed)
    return splits, notes


def _hold_out(name: str, images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    kept, held = stratified_split(images.labels, fraction, seed)
    if not len(held):
        raise DataError(f"'{name}': {len(images)} training images are too few to hold out {fraction:.0%} of them")
    return images.subset(kept), images.subset(held)


def _limited(images: ImageSet, limit: int, seed: int) -> ImageSet:
    if limit >= len(images):
        return images
    # From the kept part, which contains every class as long as the limit allows.
    return images.subset(stratified_split(images.labels, 1 - limit / len(images), seed)[0][:limit])
