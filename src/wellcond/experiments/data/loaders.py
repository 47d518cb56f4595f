"""Loaders: the order of the images, whole batches read by worker processes, and where a resumed training goes on.

What a batch holds is a function of (seed, epoch, indices) alone, whichever process reads it: a training with workers
is bit for bit the training without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from wellcond.experiments.data.draws import permutation
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.errors import DataError, RunError

Batch = tuple[Tensor, Tensor]
"""(B, C, H, W) uint8 images and (B,) int64 labels."""


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

    What is wrong with an image is given back rather than raised: from a worker it would come as a traceback in a text.
    """

    def __init__(self, images: ImageSet, *, seed: int | None = None) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> Batch | DataError:
        try:
            if self.seed is None:
                return self.images.batch(keys)
            epoch = keys[0] // len(self)
            return self.images.draw([key % len(self) for key in keys], self.seed, epoch)
        except DataError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class BatchLoader(DataLoader[Any]):
    """Batches in the order of a sampler.

    Raises:
        DataError: an image cannot be read, in whichever process.
        RunError: a worker was killed, as by the system where memory is short.
    """

    def __init__(self, batches: Batches, sampler: EpochSampler, **options: Any) -> None:
        super().__init__(batches, sampler=sampler, collate_fn=_as_it_is, **options)
        self.epoch_sampler = sampler

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            for batch in super().__iter__():
                if isinstance(batch, DataError):
                    raise batch
                yield batch
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

    def __init__(self, batches: Batches, sampler: EpochSampler, progress: Callable[[], int], **options: Any) -> None:
        super().__init__(batches, sampler, drop_last=True, **options)
        self.progress = progress

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch_sampler.epoch, "steps": self.progress()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was taken: a finished epoch is followed by the next."""
        finished = state["steps"] >= len(self)
        epoch, steps = (state["epoch"] + 1, 0) if finished else (state["epoch"], state["steps"])
        self.epoch_sampler.go_to(epoch, steps * (self.batch_size or 1))
