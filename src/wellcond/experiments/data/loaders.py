"""Loaders: the order of the images, whole batches read by worker processes, and where a resumed training goes on.

What a batch holds is a function of (seed, epoch, indices) alone, whichever process reads it: a training with workers
is bit for bit the training without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from wellcond.experiments.data.draws import permutation
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.errors import DataError, RunError

Batch = tuple[Tensor, Tensor]
"""(B, C, H, W) uint8 images and (B,) int64 labels."""

Place = tuple[int, int, np.ndarray]
"""A worker, the slot of its memory that holds the images, and their labels."""

PREFETCH = 2
"""Batches that each worker is ahead."""


class EpochSampler(DistributedSampler[int]):
    """One rank's share of a set, in an order that depends on (seed, epoch) alone.

    Rank r of R takes every R-th index from r on. For training the set is shuffled and the up to R − 1 indices left
    over are dropped, so that all ranks take as many steps; for evaluation nothing is dropped, and nothing is
    repeated as torch's sampler would, so that sums over ranks count every image once.
    It is a `DistributedSampler` because that tells Lightning to leave it in place and to call `set_epoch`.

    With ``keyed`` it gives epoch · N + index in place of the index, from which whoever reads the image knows the epoch.
    """

    def __init__(
        self, images: ImageSet, *, train: bool, seed: int, ranks: int = 1, rank: int = 0, keyed: bool = False
    ) -> None:
        super().__init__(images, num_replicas=ranks, rank=rank, shuffle=train, seed=seed, drop_last=train)
        self.length, self.keyed, self.skipped = len(images), keyed, (0, 0)

    def __len__(self) -> int:
        return len(range(self.rank, self.length - self._left_over(), self.num_replicas))

    def _left_over(self) -> int:
        return self.length % self.num_replicas if self.drop_last else 0

    def __iter__(self) -> Iterator[int]:
        order = permutation(self.length, self.seed, self.epoch) if self.shuffle else torch.arange(self.length)
        if self.keyed:
            order = order + self.epoch * self.length
        mine = order[self.rank : self.length - self._left_over() : self.num_replicas].tolist()
        epoch, done = self.skipped
        self.skipped = (0, 0)
        yield from mine[done:] if epoch == self.epoch else mine

    def go_to(self, epoch: int, done: int) -> None:
        """Let the next pass be over `epoch`, without its first `done` indices."""
        self.set_epoch(epoch)
        self.skipped = (epoch, done)


class Batches(Dataset[Any]):
    """A set as a loader reads it, a batch at once; with a ``seed`` random areas, by the keys of an `EpochSampler`.

    A worker leaves the images in memory that it shares with the process of the training and uses again and again:
    fresh shared memory would take a third as long as decoding an image of 256×256, in page faults. It gives back where
    they are. What is wrong with an image is given back too: raised in a worker it would come as a traceback in a text.

    Args:
        slots: batches that fit into the shared memory of each of the ``workers``.
    """

    def __init__(
        self, images: ImageSet, *, batch_size: int, workers: int = 0, slots: int = 0, seed: int | None = None
    ) -> None:
        self.images, self.seed = images, seed
        _, channels, height, width = images.images.shape
        shape = (workers, slots, batch_size, height, width, channels)
        self.shared = (
            torch.empty(shape, dtype=torch.uint8).share_memory_().permute(0, 1, 2, 5, 3, 4) if workers else None
        )
        self._read = 0  # batches, by this process

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> Batch | Place | DataError:
        worker = get_worker_info()
        try:
            if worker is None or self.shared is None:
                return self._batch(keys, None)
            slot = self._read % self.shared.shape[1]
            _, labels = self._batch(keys, self.shared[worker.id, slot, : len(keys)])
            self._read += 1
            return worker.id, slot, labels.numpy()
        except DataError as error:
            return error

    def _batch(self, keys: list[int], out: Tensor | None) -> Batch:
        into = {} if out is None else {"out": out}
        if self.seed is None:
            return self.images.batch(keys, **into)
        return self.images.draw([key % len(self) for key in keys], self.seed, keys[0] // len(self), **into)

    def at(self, place: Place) -> Batch:
        """The batch that a worker left there."""
        assert self.shared is not None
        worker, slot, labels = place
        return self.shared[worker, slot, : len(labels)], torch.from_numpy(labels)


def _as_it_is(batch: Any) -> Any:
    return batch


class BatchLoader(DataLoader[Any]):
    """Batches in the order of a sampler, in the memory of the process or of its workers.

    Images that workers read are in memory that is written again after the next batch: copy what is to be kept longer.
    For a GPU they are a copy, pinned.

    Raises:
        DataError: an image cannot be read, in whichever process.
        RunError: a worker was killed, as by the system where memory is short.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: EpochSampler,
        *,
        batch_size: int,
        workers: int = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        # Of every worker PREFETCH batches wait or are at work, one is in use, and one was in use before.
        self.batches = Batches(images, batch_size=batch_size, workers=workers, slots=PREFETCH + 2, seed=seed)
        if workers:
            options |= {"prefetch_factor": PREFETCH, "persistent_workers": True}
        super().__init__(
            self.batches, batch_size, sampler=sampler, num_workers=workers, collate_fn=_as_it_is, **options
        )
        self.epoch_sampler, self._pin = sampler, torch.cuda.is_available()

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            for found in super().__iter__():
                if isinstance(found, DataError):
                    raise found
                images, labels = found if len(found) == 2 else self.batches.at(found)
                yield (images.pin_memory(), labels.pin_memory()) if self._pin else (images, labels)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a process that reads images ended ({str(error).splitlines()[0]}): give fewer --workers, or more "
                "memory, and go on with --resume"
            ) from error


class TrainLoader(BatchLoader):
    """A loader that Lightning can resume in the middle of an epoch: it saves and restores `state_dict()`.

    `progress` gives the number of batches of the current epoch that the training has finished with.
    """

    def __init__(self, images: ImageSet, sampler: EpochSampler, progress: Callable[[], int], **options: Any) -> None:
        super().__init__(images, sampler, drop_last=True, **options)
        self.progress = progress

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch_sampler.epoch, "steps": self.progress()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was taken: a finished epoch is followed by the next."""
        finished = state["steps"] >= len(self)
        epoch, steps = (state["epoch"] + 1, 0) if finished else (state["epoch"], state["steps"])
        self.epoch_sampler.go_to(epoch, steps * (self.batch_size or 1))
