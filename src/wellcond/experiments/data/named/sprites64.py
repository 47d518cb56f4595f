"""The same sprites as 3×64×64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wellcond.experiments.data.named import sprites

if TYPE_CHECKING:
    from wellcond.experiments.data.tables import Source

SETTINGS, GENERATOR_SETTINGS = sprites.SETTINGS, sprites.GENERATOR_SETTINGS


def load() -> Source:
    """Sprites of twice the size, of the same factors."""
    return sprites.load(64)
