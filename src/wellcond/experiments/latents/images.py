"""Images to learn to generate, from any source of `load_images`; classes are not needed."""

from __future__ import annotations

from pathlib import Path

import torch

from wellcond.experiments.data.contents import IMAGE_SUFFIXES
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import MEMORY_BUDGET, check_size
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.data.settle import settle
from wellcond.experiments.data.sources import open_source
from wellcond.experiments.data.tables import from_tables
from wellcond.experiments.errors import DataError
from wellcond.experiments.latents.config import LatentsConfig
from wellcond.experiments.latents.generator import resolutions


def training_images(config: LatentsConfig) -> ImageSet:
    """The training images of `config`: a split `train` or all there are, also those of a folder without classes.

    Raises:
        DataError: no images, of different sizes or of a size that no generator has.
    """
    check_size(config.image_size)
    path = Path(config.data).expanduser()
    images = _flat(path) if config.data not in NAMED and _is_flat(path) else open_source(config.data).splits["train"]
    (images,), _ = settle([images], config.image_size, MEMORY_BUDGET)
    if config.limit is not None and config.limit < len(images):
        images = images.subset(torch.linspace(0, len(images) - 1, config.limit).long())  # of all folders
    _, _, height, width = images.images.shape
    if height != width:
        raise DataError(
            f"'{config.data}' has images of {height}×{width}, and generators make squares: bring them to N×N with "
            "--image-size N, such as 64"
        )
    resolutions(height)
    return images


def _is_flat(path: Path) -> bool:
    """Whether images lie in this folder itself."""
    return path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())


def _flat(path: Path) -> ImageSet:
    import datasets

    files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["image"])})
    table = datasets.Dataset.from_dict({"image": files, "label": [0] * len(files)}, features=features)
    return from_tables(f"'{path}'", {"train": table}, path.name).splits["train"]
