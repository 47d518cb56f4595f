"""Random choices as functions of (seed, epoch, …) only, so that runs can be resumed exactly."""

from __future__ import annotations

import numpy as np
import torch

TEST_FRACTION = 0.2
"""The fraction of each class held out for testing if a source has no test split."""


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed from several non-negative numbers; unlike a sum, it differs for (0, 1) and (1, 0)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def permutation(n: int, *numbers: int) -> torch.Tensor:
    """A random permutation of 0, …, n − 1 that depends only on `numbers`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(*numbers)))


def stratified_split(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (kept, held out), both in ascending order, with `round(fraction · N)` held out.

    Each class contributes proportionally to within one image (largest remainders) but keeps at least one, so that fewer
    may be held out in total. The choice depends only on `labels` and `seed`. (Scikit-learn's split rejects classes with
    a single image.)
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
