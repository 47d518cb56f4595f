"""A small network that sees the factors of a sprite, and whose features measure how far apart images are."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.experiments.data.draws import permutation
from wellcond.experiments.data.sprites import FACTORS, RANGES, SHAPES, sprites
from wellcond.experiments.latents.generator import resolutions

EPOCHS, BATCH, LR = 6, 64, 2e-3
N_FEATURES = 64
TRAIN_SEED, TEST_SEED = 0, 2
"""The seeds of the factors of the training and test images of the data set `sprites`."""


class Observer(nn.Module):
    """Features (N, 64) of images (N, 3, size, size) in [−1, 1], and from them the factors.

    Convolutions of stride 2 down to 4×4, one hidden layer (the features), and one linear layer for the logits of the
    shapes and the other factors, scaled to [−1, 1] over their ranges.
    """

    features: nn.Sequential
    factors: nn.Linear

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, _ in enumerate(resolutions(size)):
            layers += [nn.Conv2d(channels, min(64, 16 << i), 4, stride=2, padding=1), nn.ReLU()]
            channels = min(64, 16 << i)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, N_FEATURES), nn.ReLU())
        self.factors = nn.Linear(N_FEATURES, len(SHAPES) + len(RANGES))

    def forward(self, images: Tensor) -> Tensor:
        return self.factors(self.features(images))

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """(N, 6) float64: the factors of images, in the units of `sprite_factors`."""
        found = self(images).double().cpu()
        shape = found[:, : len(SHAPES)].argmax(1, keepdim=True).double()
        low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).T
        return torch.cat([shape, low + (found[:, len(SHAPES) :] + 1) / 2 * (high - low)], 1)


def as_targets(factors: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 shapes, and (N, 5) float32 of the other factors scaled to [−1, 1]."""
    low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).T
    return factors[:, 0].long(), ((factors[:, 1:] - low) / (high - low) * 2 - 1).float()


def scaled(images: Tensor) -> Tensor:
    """uint8 as float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


@cache
def observer_of(size: int, count: int) -> Observer:
    """The observer of sprites of this size, trained on `count` of them; the same in every process.

    Kept for the next generator of the process. Global random numbers neither change it nor change by it.
    """
    images, factors = sprites(count, size=size, seed=TRAIN_SEED)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        observer = Observer(size)
        _fit(observer, images, *as_targets(factors))
    return observer.eval().requires_grad_(False)


def _fit(observer: Observer, images: Tensor, shapes: Tensor, others: Tensor) -> None:
    optimizer = torch.optim.Adam(observer.parameters(), lr=LR)
    batches = [part for epoch in range(EPOCHS) for part in permutation(len(images), 0, epoch).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches))
    for batch in batches:
        found = observer(scaled(images[batch]))
        loss = F.cross_entropy(found[:, : len(SHAPES)], shapes[batch])
        loss = loss + F.mse_loss(found[:, len(SHAPES) :], others[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy_of(observer: Observer, images: Tensor, factors: Tensor) -> dict[str, float]:
    """By factor: the accuracy of the shape, and R² of the others, on images (N, 3, H, W) uint8."""
    seen = torch.cat([observer.see(scaled(part)) for part in images.split(500)])
    right = float((seen[:, 0] == factors[:, 0]).double().mean())
    residual = (seen - factors)[:, 1:].square().mean(0) / factors[:, 1:].var(0, correction=0)
    return dict(zip(FACTORS, [right, *(1 - residual).tolist()], strict=True))
