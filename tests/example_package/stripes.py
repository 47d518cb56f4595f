"""A data set: horizontal and vertical stripes, and the recipe that suits it."""

import torch

from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.tables import Source

SETTINGS = {"model": "resnet8", "width": 4, "epochs": 1, "batch_size": 16, "augment": False, "threads": 1}


def load():
    labels = torch.arange(120) % 2
    pattern = (torch.arange(8) % 2 * 255).to(torch.uint8)
    images = torch.where(labels.view(-1, 1, 1, 1) == 0, pattern.view(1, 1, 8, 1), pattern.view(1, 1, 1, 8))
    whole = ImageSet(images.contiguous(), labels)
    parts = {"train": torch.arange(80), "test": torch.arange(80, 120)}
    return Source("stripes", {name: whole.subset(part) for name, part in parts.items()}, ("rows", "columns"))
