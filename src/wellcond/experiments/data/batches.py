"""Batches for Lightning: their order, their augmentation on the device, and where a resumed training goes on.

As usual for CIFAR since He et al., "Deep residual learning" (CVPR 2016), section 4.2: a border of an eighth of the
image (4 of 32 pixels) is added, a window of the old size is taken from it at random, and half of the images are
mirrored. Cropping and flipping are kornia's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from wellcond.experiments.data.draws import mixed_seed, permutation
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.errors import DataError, needs_train_extra

with needs_train_extra():
    import lightning.pytorch as pl


class BatchAugmentation(nn.Module):
    """uint8 batches (B, C, H, W) to normalised float32 batches, augmented on request.

    Args:
        mean, std: (C,) float32 of the pixels of the training images, in units of 0 to 255.
        flip: whether a mirror image belongs to the same class.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, *, flip: bool) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        """(pixels − mean) / std as float32, without augmentation."""
        return (images.float() - self.mean) / self.std

    def augment(self, images: Tensor, *key: int) -> Tensor:
        """Cropped, flipped and normalised, with random numbers that depend on `key` (non-negative) alone.

        The numbers are drawn on the CPU, so they are the same on every device; torch's own generator is left
        as it was. Takes 5 ms for 128 × 3 × 32 × 32 on one CPU core.
        """
        with needs_train_extra():
            import kornia.augmentation as K

        height, width = images.shape[-2:]
        border = (max(1, round(width / 8)), max(1, round(height / 8)))  # left and right, top and bottom
        crop = K.RandomCrop((height, width), padding=border, cropping_mode="slice")
        flip = K.RandomHorizontalFlip(p=0.5 if self.flip else 0.0)
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(mixed_seed(*key))
        try:
            return self(flip(crop(images.float())))
        finally:
            torch.set_rng_state(before)


class EpochSampler(DistributedSampler[int]):
    """One rank's share of a set, in an order that depends on (seed, epoch) alone.

    Rank r of R takes every R-th index from r on. For training the set is shuffled and the up to R − 1 indices left
    over are dropped, so that all ranks take as many steps; for evaluation nothing is dropped, and nothing is
    repeated as torch's sampler would, so that sums over ranks count every image once.
    It is a `DistributedSampler` because that tells Lightning to leave it in place and to call `set_epoch`.
    """

    def __init__(self, images: ImageSet, *, train: bool, seed: int, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(images, num_replicas=ranks, rank=rank, shuffle=train, seed=seed, drop_last=train)
        self.length, self.skipped = len(images), (0, 0)

    def __len__(self) -> int:
        return len(range(self.rank, self.length - self._left_over(), self.num_replicas))

    def _left_over(self) -> int:
        return self.length % self.num_replicas if self.drop_last else 0

    def __iter__(self) -> Iterator[int]:
        order = permutation(self.length, self.seed, self.epoch) if self.shuffle else torch.arange(self.length)
        mine = order[self.rank : self.length - self._left_over() : self.num_replicas].tolist()
        epoch, done = self.skipped
        self.skipped = (0, 0)
        yield from mine[done:] if epoch == self.epoch else mine

    def go_to(self, epoch: int, done: int) -> None:
        """Let the next pass be over `epoch`, without its first `done` indices."""
        self.set_epoch(epoch)
        self.skipped = (epoch, done)


class TrainLoader(DataLoader[Any]):
    """A loader that Lightning can resume in the middle of an epoch: it saves and restores `state_dict()`.

    `progress` gives the number of batches of the current epoch that the training has finished with.
    """

    def __init__(self, images: ImageSet, sampler: EpochSampler, progress: Callable[[], int], **options: Any) -> None:
        super().__init__(images, sampler=sampler, drop_last=True, **options)
        self.epoch_sampler, self.progress = sampler, progress

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch_sampler.epoch, "steps": self.progress()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was taken: a finished epoch is followed by the next."""
        finished = state["steps"] >= len(self)
        epoch, steps = (state["epoch"] + 1, 0) if finished else (state["epoch"], state["steps"])
        self.epoch_sampler.go_to(epoch, steps * (self.batch_size or 1))


class ImageDataModule(pl.LightningDataModule):
    """Batches of an `ImageData` for Lightning: uint8 on their way to the device, normalised float32 there.

    The order of the training images depends on (seed, epoch), the augmentation on (seed, epoch, batch, rank):
    a run resumed from any checkpoint, also of mid-epoch, goes on with the batches it would have had. Without a
    trainer the loaders give everything, and `on_after_batch_transfer` normalises.

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
        return TrainLoader(self.data.train, sampler, self._steps_done, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the validation images, in order."""
        images = self.data.validation
        return DataLoader(images, sampler=self._sampler(images, train=False), **self._options())

    def test_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the test images, in order."""
        images = self.data.test
        return DataLoader(images, sampler=self._sampler(images, train=False), **self._options())

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
        if trainer is not None:  # in "true" half or double precision the images are to have the weights' type
            images = trainer.precision_plugin.convert_input(images)
        return images, labels

    def _sampler(self, images: ImageSet, train: bool) -> EpochSampler:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return EpochSampler(images, train=train, seed=self.seed, ranks=ranks, rank=rank)

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # a generator of its own, or every pass would advance the global one
            "generator": torch.Generator().manual_seed(mixed_seed(self.seed)),
        }

    def _steps_done(self) -> int:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current if self.trainer else None
        return progress.processed if progress else 0
