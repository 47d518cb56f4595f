"""CIFAR-100 (Krizhevsky 2009), 3×32×32 photographs of 100 classes, from the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wellcond.experiments.data.tables import Source


def load() -> Source:
    """The published splits of 50,000 and 10,000 images."""
    from wellcond.experiments.data.sources import from_hub

    return from_hub("uoft-cs/cifar100", "cifar100")
