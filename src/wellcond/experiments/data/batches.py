"""The Lightning data module: order of the images, processing on the device, and resuming within an epoch."""

from __future__ import annotations

from typing import Any

import torch

from wellcond.experiments.data.augmentation import BatchAugmentation
from wellcond.experiments.data.draws import mixed_seed
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.data.loaders import BatchLoader, EpochSampler, TrainLoader
from wellcond.experiments.errors import DataError, needs_train_extra

with needs_train_extra():
    import lightning.pytorch as pl


class ImageDataModule(pl.LightningDataModule):
    """Batches of an `ImageData` for Lightning: transferred to the device as uint8 and normalised there to float32.

    The order of the training images depends on (seed, epoch), flips and crops on (seed, epoch, batch, rank), and random
    areas on (seed, epoch, image). A run resumed from any checkpoint, even within an epoch, therefore gets the same
    batches, with any number of workers. Without a trainer the loaders return all images, and `on_after_batch_transfer`
    only normalises.

    Args:
        data: the images.
        batch_size: per process. An incomplete last batch of training images is dropped.
        augment: crop and flip the training images at random.
        seed: of order and augmentation, non-negative.
        workers: worker processes, useful if images are decoded on access.
        memory_format: of the batches on the device.

    Raises:
        DataError: the batch is larger than the training set.
    """

    data: ImageData
    batch_size: int
    augment: bool
    seed: int
    workers: int
    memory_format: torch.memory_format
    areas: bool
    augmentation: BatchAugmentation

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        augment: bool = True,
        seed: int = 0,
        workers: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.augment, self.seed = data, batch_size, augment, seed
        self.workers, self.memory_format = workers, memory_format
        self.areas = augment and data.train.has_areas
        self._check_batch(1)
        statistics = data.channel_statistics()
        self.augmentation = BatchAugmentation(*statistics, flip=data.flip, border=not data.train.has_areas)

    def _check_batch(self, ranks: int) -> None:
        if not 1 <= self.batch_size * ranks <= len(self.data.train):
            raise DataError(
                f"'{self.data.name}': a batch of {self.batch_size} on each of {ranks} process(es) does not fit "
                f"into {len(self.data.train)} training images; give a size from 1 to {len(self.data.train) // ranks}"
            )

    def train_dataloader(self) -> TrainLoader:
        """This rank's training batches (uint8 images, labels); the order is set by `set_epoch` of the sampler."""
        sampler = self._sampler(self.data.train, train=True, keyed=self.areas)
        self._check_batch(sampler.num_replicas)
        seed = self.seed if self.areas else None
        return TrainLoader(self.data.train, sampler, self._steps_done, seed=seed, **self._options())

    def val_dataloader(self) -> BatchLoader:
        """This rank's share of the validation images, in order."""
        return self._in_order(self.data.validation)

    def test_dataloader(self) -> BatchLoader:
        """This rank's share of the test images, in order."""
        return self._in_order(self.data.test)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise a batch on its device, and augment it while training."""
        images, labels = batch
        self.augmentation.to(images.device)
        trainer = self.trainer
        if trainer is not None and trainer.training and self.augment:
            batch_index = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            key = (self.seed, trainer.current_epoch, batch_index, trainer.global_rank)
            images = self.augmentation.augment(images, *key)
        else:
            images = self.augmentation(images)
        if trainer is not None:  # "true" half or double precision needs images of the weights' dtype
            images = trainer.precision_plugin.convert_input(images)
        return images.contiguous(memory_format=self.memory_format), labels

    def _in_order(self, images: ImageSet) -> BatchLoader:
        return BatchLoader(images, self._sampler(images, train=False), **self._options())

    def _sampler(self, images: ImageSet, **options: Any) -> EpochSampler:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return EpochSampler(images, seed=self.seed, ranks=ranks, rank=rank, **options)

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "workers": self.workers,
            # its own generator, as every pass would otherwise advance the global one
            "generator": torch.Generator().manual_seed(mixed_seed(self.seed)),
        }

    def _steps_done(self) -> int:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current if self.trainer else None
        return progress.processed if progress else 0
