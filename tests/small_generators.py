"""Small generators for tests, and what their runs leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from small_runs import differences
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.sprites import sprites
from wellcond.experiments.files import read_csv
from wellcond.experiments.latents.config import LatentsConfig, latents_config

WIDTHS = {"base_channels": 2, "max_channels": 8}
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def small(**options: Any) -> LatentsConfig:
    """Eight steps on few small images, recorded every other one."""
    defaults = {"data": "sprites", "image_size": 8, "noise": 4, "n_basis": 2, **WIDTHS, "batch_size": 4}
    defaults |= {"steps": 8, "record_every": 2, "r1_every": 3, "lr": 1e-3, "average": 0.9, "threads": 1}
    return latents_config(**{**defaults, **options})


def few(size: int = 8, count: int = 10) -> ImageSet:
    images, factors = sprites(count, size=size)
    return ImageSet(images, factors[:, 0].long())


def words_of(config: LatentsConfig) -> list[str]:
    """The options of an eigengan without the orthogonal loss."""
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if k not in ("latents", "ol_weight")]


def checkpoint(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state.pop("seconds")
    return state


def metrics(folder: Path) -> list[dict[str, str]]:
    times = ("seconds", "seconds_total", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_csv(folder / "metrics.csv")]


def assert_same(one: Path, other: Path) -> None:
    assert differences(checkpoint(one), checkpoint(other)) == []
    assert metrics(one) == metrics(other)
    for picture in sorted(path.relative_to(one) for path in one.rglob("*.png")):
        assert (one / picture).read_bytes() == (other / picture).read_bytes()
