"""26,000 sprites, 3×32×32: rectangles, ellipses and triangles drawn from known factors; no file, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellcond.experiments.data.tables import Source

SETTINGS: dict[str, Any] = {"model": "resnet8", "epochs": 5, "augment": False, "monitor_every": 20}
# A short run on a CPU; the recipe `latents` trains longer.
GENERATOR_SETTINGS: dict[str, Any] = {
    "base_channels": 8,
    "noise": 32,
    "batch_size": 16,
    "lr": 1e-3,
    "steps": 1000,
    "average": 0.99,
    "record_every": 250,
    "threads": 1,
}
SPLITS = {"train": 20_000, "validation": 2_000, "test": 4_000}
"""The number of images of each split; the seeds of their factors are 0, 1 and 2."""


def load(size: int = 32) -> Source:
    """Sprites of this size, labelled by their shape."""
    from wellcond.experiments.data.images import ImageSet
    from wellcond.experiments.data.sprites import SHAPES, sprites
    from wellcond.experiments.data.tables import Source

    splits = {}
    for seed, (split, count) in enumerate(SPLITS.items()):
        images, factors = sprites(count, size=size, seed=seed)
        splits[split] = ImageSet(images, factors[:, 0].long())
    return Source("sprites" if size == 32 else f"sprites{size}", splits, SHAPES)
