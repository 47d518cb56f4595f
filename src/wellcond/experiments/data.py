"""Image data sets for experiments: one loader for names, paths and arrays, and their batches for Lightning.

Splits are made from labels alone, before any image is decoded, and depend on the seed only as stated: which
images are for testing never does, so that runs with different seeds are tested on the same images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wellcond.experiments._extras import needs_train_extra
from wellcond.experiments._imageset import DataError, ImageSet, settle
from wellcond.experiments._sampling import EpochSampler, TrainLoader, mixed_seed, stratified_split
from wellcond.experiments._sources import TEST_FRACTION, open_source
from wellcond.experiments.augmentation import BatchAugmentation

with needs_train_extra():
    import lightning.pytorch as pl

if TYPE_CHECKING:
    import datasets

__all__ = ["DataError", "ImageData", "ImageDataModule", "ImageSet", "load_images"]

_STATISTICS_IMAGES = 50_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Labelled images for training, for choosing between results of training, and for the final test.

    Attributes:
        name: where they come from, in a word.
        train, validation, test: disjoint sets of images.
        classes: the names of the classes, by label.
        notes: what was decided in loading that a reader of results should know.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

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
        """How many classes there are."""
        return len(self.classes)

    @property
    def flip(self) -> bool:
        """Whether mirror images keep their class: not where classes are single characters, such as digits."""
        return not all(len(name) == 1 for name in self.classes)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over pixels, (C,) float32 each, of the training images (0 to 255).

        From the histogram of up to 50,000 images spread over the set. A constant channel has deviation 1.
        """
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
    memory_budget: int = 2 << 30,
) -> ImageData:
    """Load labelled images from any source, in splits for training, validation and testing.

    Args:
        source: `digits` (scikit-learn's, no network), `cifar10`, `cifar100`; any other name on the Hugging Face
            hub, `OWNER/NAME` or `OWNER/NAME:CONFIGURATION`; a path to a folder with parquet files in the hub's
            layout (`train-*.parquet`, …) or with images (`train/CLASS/*.png`, …), or to one parquet file; a pair
            (images, labels) of uint8 (N, C, H, W) and integers (N,); or a `datasets.DatasetDict`.
        image_size: bring every image to this height and width (shorter side scaled, middle cropped).
        limit: keep at most this many images of each split, in the proportions of the classes.
        seed: of the choice of validation images, and of those that `limit` keeps for training.
        validation: the fraction of the training images, stratified by class, that is set apart for choosing
            between results where the source has no validation split beside its test split.
        memory_budget: bytes up to which all images are decoded at once; beyond, they are decoded when read.

    Returns:
        The images. Where the source has no test split, its validation split is the test; where it has neither,
        a fifth of the training images is held out, the same ones whatever the seed. `notes` says so, and the log.

    Raises:
        DataError: the source is unknown, cannot be reached or is not labelled images; images differ in size or
            cannot be decoded; too few images for the splits. The message says which and what to do.
        TypeError: the source is of no kind that is understood.

    Example:
        >>> data = load_images("digits")
        >>> len(data.train), len(data.validation), len(data.test)
        (1294, 144, 359)
        >>> data.in_channels, data.image_size, data.num_classes
        (1, (8, 8), 10)
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    if not 0 < validation < 1:
        raise DataError(f"validation must be a fraction between 0 and 1, got {validation}")
    found = open_source(source)
    if len(found.classes) < 2:
        raise DataError(f"'{found.name}' has one class only, {found.classes}: there is nothing to tell apart")
    splits, notes = dict(found.splits), list(found.notes)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no test split: the validation split is the test")
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(found.name, splits["train"], TEST_FRACTION, 0)
        notes.append(f"no test split: {len(splits['test'])} training images, stratified by class, are the test")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(found.name, splits["train"], validation, seed)
    if limit is not None:
        chosen = {"train": seed, "validation": seed, "test": 0}
        splits = {s: _limited(images, limit, chosen[s]) for s, images in splits.items()}
    train, valid, test = settle([splits[s] for s in ("train", "validation", "test")], image_size, memory_budget)
    for note in notes:
        _log.warning("%s: %s", found.name, note)
    return ImageData(found.name, train, valid, test, found.classes, tuple(notes))


def _hold_out(name: str, images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    kept, held = stratified_split(images.labels, fraction, seed)
    if not len(held):
        raise DataError(f"'{name}': {len(images)} training images are too few to set {fraction:.0%} of them apart")
    return images.subset(kept), images.subset(held)


def _limited(images: ImageSet, limit: int, seed: int) -> ImageSet:
    if limit >= len(images):
        return images
    # Of the kept part, since that has every class as long as there is room.
    return images.subset(stratified_split(images.labels, 1 - limit / len(images), seed)[0][:limit])


class ImageDataModule(pl.LightningDataModule):
    """Batches of an `ImageData` for Lightning: uint8 on their way to the device, normalised float32 there.

    The order of the training images depends on (seed, epoch), the augmentation on (seed, epoch, batch, rank):
    a run resumed from any checkpoint, also of mid-epoch, goes on with the batches it would have had. In several
    processes every rank takes its own share, by samplers that Lightning leaves in place. Without a trainer the
    loaders give everything, and `on_after_batch_transfer` normalises.

    Args:
        data: the images.
        batch_size: of one process. An incomplete last batch of training images is dropped.
        augment: crop and flip the training images at random.
        seed: of order and augmentation, not negative.
        num_workers: processes that read batches; useful where images are decoded when read.

    Raises:
        DataError: the batch is larger than the training set.
    """

    def __init__(
        self, data: ImageData, batch_size: int, *, augment: bool = True, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.augment, self.seed = data, batch_size, augment, seed
        self.num_workers = num_workers
        self._check_batch(1)
        self.augmentation = BatchAugmentation(*data.channel_statistics(), flip=data.flip)

    def _check_batch(self, ranks: int) -> None:
        if not 1 <= self.batch_size * ranks <= len(self.data.train):
            raise DataError(
                f"'{self.data.name}': a batch of {self.batch_size} on each of {ranks} process(es) does not fit "
                f"into {len(self.data.train)} training images; give a size from 1 to {len(self.data.train) // ranks}"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's training batches (uint8 images, labels), in an order that `set_epoch` of its sampler changes."""
        sampler = self._sampler(self.data.train, train=True)
        self._check_batch(sampler.num_replicas)
        return TrainLoader(self.data.train, self.batch_size, sampler, self._steps_done, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the validation images, in order."""
        return self._evaluation_loader(self.data.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the test images, in order."""
        return self._evaluation_loader(self.data.test)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise a batch on its device, and augment it while training."""
        images, labels = batch
        self.augmentation.to(images.device)
        trainer = self.trainer
        if trainer is None or not (trainer.training and self.augment):
            images = self.augmentation(images)
        else:
            batch_index = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            key = (self.seed, trainer.current_epoch, batch_index, trainer.global_rank)
            images = self.augmentation.augment(images, *key)
        if trainer is not None:  # in "true" half or double precision the images are to have the weights' type
            images = trainer.precision_plugin.convert_input(images)
        return images, labels

    def _evaluation_loader(self, images: ImageSet) -> DataLoader[Any]:
        sampler = self._sampler(images, train=False)
        return DataLoader(images, self.batch_size, sampler=sampler, **self._loading())

    def _sampler(self, images: ImageSet, train: bool) -> EpochSampler:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return EpochSampler(images, train=train, seed=self.seed, ranks=ranks, rank=rank)

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # a generator of its own, or every pass would advance the global one
            "generator": torch.Generator().manual_seed(mixed_seed(self.seed)),
        }

    def _steps_done(self) -> int:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current if self.trainer else None
        return progress.processed if progress else 0
