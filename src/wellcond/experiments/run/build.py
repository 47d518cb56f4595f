"""Builds the images, the network and the batches of a configuration; every invalid option raises here."""

from __future__ import annotations

from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.run.compiled import require_compiler
from wellcond.experiments.run.config import RunConfig, refuse_unsafe
from wellcond.experiments.run.training import MEMORY_FORMATS, Classifier


def build(config: RunConfig, data: ImageData | None) -> tuple[Classifier, ImageDataModule]:
    """The network and the batches of `config`.

    Args:
        data: the images from `load`, if already loaded.

    Raises:
        ValueError: an invalid option, or one not supported on this machine.
    """
    refuse_unsafe(config)
    data = data or load(config)
    module = Classifier(config, num_classes=data.num_classes, in_channels=data.in_channels)
    if config.compile:
        require_compiler()
    return module, batches(config, data, augment=config.augment)


def load(config: RunConfig) -> ImageData:
    """The images of `config`, prepared for its crops."""
    areas = config.crop == "resized"
    return load_images(config.data, image_size=config.image_size, limit=config.limit, areas=areas)


def batches(config: RunConfig, data: ImageData, *, augment: bool) -> ImageDataModule:
    """The batches of `config`, ordered by its seed."""
    memory_format = MEMORY_FORMATS[config.memory_format]
    options = {"seed": config.seed, "workers": config.workers, "memory_format": memory_format}
    return ImageDataModule(data, config.batch_size, augment=augment, **options)
