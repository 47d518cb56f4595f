"""The order of training images and all other randomness as functions of (seed, epoch, …), so that runs resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from wellcond.experiments._imageset import ImageSet


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed from several non-negative numbers; unlike their sum, (0, 1) and (1, 0) share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def permutation(n: int, *numbers: int) -> torch.Tensor:
    """A random order of 0, …, n − 1 that depends on `numbers` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(*numbers)))


def stratified_split(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (kept, held out), both in ascending order: `round(fraction · N)` of them are held out.

    Each class gives its share to within one image (largest remainders), but keeps at least one image, for which
    fewer may be held out in all. The choice depends on `labels` and `seed` alone. (Scikit-learn's own refuses
    classes of a single image.)
    """
    order = permutation(len(labels), seed)
    groups = [order[labels[order] == label] for label in labels.unique()]
    shares = [fraction * len(group) for group in groups]
    counts = [min(int(share), len(group) - 1) for share, group in zip(shares, groups, strict=True)]
    missing = round(fraction * len(labels)) - sum(counts)
    by_remainder = sorted(range(len(groups)), key=lambda g: counts[g] - shares[g])
    for g in [g for g in by_remainder if counts[g] < len(groups[g]) - 1][:missing]:
        counts[g] += 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    for group, count in zip(groups, counts, strict=True):
        held[group[:count]] = True
    return torch.where(~held)[0], torch.where(held)[0]


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

    Args:
        images: what to load from.
        batch_size: of one rank; an incomplete last batch is dropped.
        sampler: this rank's order.
        steps_done: gives the number of batches of the current epoch that the training has finished with.
        others: further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        sampler: EpochSampler,
        steps_done: Callable[[], int],
        **others: Any,
    ) -> None:
        super().__init__(images, batch_size, sampler=sampler, drop_last=True, **others)
        self.epoch_sampler, self.steps_done = sampler, steps_done

    def state_dict(self) -> dict[str, int]:
        """The epoch and how much of it is done."""
        return {"epoch": self.epoch_sampler.epoch, "steps": self.steps_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was taken: a finished epoch is followed by the next."""
        finished = state["steps"] >= len(self)
        epoch, steps = (state["epoch"] + 1, 0) if finished else (state["epoch"], state["steps"])
        self.epoch_sampler.go_to(epoch, steps * (self.batch_size or 1))
