"""Data loaders: order of the images, whole batches read by worker processes, and resuming within an epoch.

A batch depends only on (seed, epoch, indices) and not on the process that reads it: training is bit for bit the same
with and without workers.
"""

from __future__ import annotations

import signal
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
"""A worker, the slot of its shared memory with the images, and the labels."""

PREFETCH = 2
"""Batches prefetched by each worker."""


class EpochSampler(DistributedSampler[int]):
    """One rank's share of a set, in an order that depends only on (seed, epoch).

    Rank r of R takes every R-th index starting at r. For training the set is shuffled and up to R − 1 remaining indices
    are dropped, so that all ranks take the same number of steps. For evaluation nothing is dropped or repeated, unlike
    in torch's sampler, so that sums over ranks count every image once.
    It is a `DistributedSampler` so that Lightning keeps it and calls `set_epoch`.

    With ``keyed`` it yields epoch · N + index instead of the index, so that workers know the epoch.
    """

    length: int
    keyed: bool
    skipped: tuple[int, int]

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
        epoch, count = self.skipped
        self.skipped = (0, 0)
        yield from mine[count:] if epoch == self.epoch else mine

    def go_to(self, epoch: int, count: int) -> None:
        """Continue in `epoch` after its first `count` indices."""
        self.set_epoch(epoch)
        self.skipped = (epoch, count)


class Batches(Dataset[Any]):
    """An image set read in whole batches; with a ``seed``, random areas by the keys of an `EpochSampler`.

    Workers write images to shared memory that is allocated once and reused, and return their position: the page faults
    of new shared memory would cost a third of the time of decoding a 256×256 image. A `DataError` is returned as well,
    since an exception in a worker would arrive as text with a traceback.

    Args:
        slots: batches in the shared memory of each of the ``workers``.
    """

    images: ImageSet
    seed: int | None
    shared: Tensor | None

    def __init__(
        self, images: ImageSet, *, batch_size: int, workers: int = 0, slots: int = 0, seed: int | None = None
    ) -> None:
        self.images, self.seed = images, seed
        _, channels, height, width = images.images.shape
        shape = (workers, slots, batch_size, height, width, channels)
        self.shared = (
            torch.empty(shape, dtype=torch.uint8).share_memory_().permute(0, 1, 2, 5, 3, 4) if workers else None
        )
        self._batches_read = 0  # by this process

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> Batch | Place | DataError:
        worker = get_worker_info()
        try:
            if worker is None or self.shared is None:
                return self._batch(keys, None)
            slot = self._batches_read % self.shared.shape[1]
            _, labels = self._batch(keys, self.shared[worker.id, slot, : len(keys)])
            self._batches_read += 1
            return worker.id, slot, labels.numpy()
        except DataError as error:
            return error

    def _batch(self, keys: list[int], out: Tensor | None) -> Batch:
        if self.seed is None:
            return self.images.batch(keys, out)
        return self.images.draw([key % len(self) for key in keys], self.seed, keys[0] // len(self), out=out)

    def at(self, place: Place) -> Batch:
        """The batch that a worker wrote at this position."""
        assert self.shared is not None
        worker, slot, labels = place
        return self.shared[worker, slot, : len(labels)], torch.from_numpy(labels)


def _identity(batch: Any) -> Any:
    return batch


def _leave_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; this one ends when the training does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchLoader(DataLoader[Any]):
    """Batches in the order of a sampler, read in this process or by workers.

    Images read by workers are in memory that is overwritten after the next batch: copy them to keep them. With a GPU
    they are copies in pinned memory.

    Raises:
        DataError: an image cannot be read, in any process.
        RunError: a worker was killed, for example because memory ran out.
    """

    batches: Batches
    epoch_sampler: EpochSampler

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
        # Per worker: PREFETCH batches waiting or in progress, the current one, and the previous one.
        self.batches = Batches(images, batch_size=batch_size, workers=workers, slots=PREFETCH + 2, seed=seed)
        if workers:
            options |= {"prefetch_factor": PREFETCH, "persistent_workers": True, "worker_init_fn": _leave_ctrl_c}
        super().__init__(
            self.batches, batch_size, sampler=sampler, num_workers=workers, collate_fn=_identity, **options
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
                f"a worker that reads images died ({str(error).splitlines()[0]}): use fewer --workers or more memory, "
                "and go on with --resume"
            ) from error


class TrainLoader(BatchLoader):
    """A loader that Lightning can resume within an epoch, by saving and restoring its `state_dict()`.

    `progress` returns the number of completed batches of the current epoch.
    """

    def __init__(self, images: ImageSet, sampler: EpochSampler, progress: Callable[[], int], **options: Any) -> None:
        super().__init__(images, sampler, drop_last=True, **options)
        self.progress = progress

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch_sampler.epoch, "steps": self.progress()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after `state`; after a finished epoch, with the next one."""
        finished = state["steps"] >= len(self)
        epoch, steps = (state["epoch"] + 1, 0) if finished else (state["epoch"], state["steps"])
        self.epoch_sampler.go_to(epoch, steps * (self.batch_size or 1))
