"""Labelled 8-bit images with one interface: in memory, decoded on access, or as random areas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wellcond.experiments.data import crops
from wellcond.experiments.data.encoded import EncodedImages
from wellcond.experiments.errors import needs_train_extra

with needs_train_extra():
    from PIL import Image


@dataclass(frozen=True)
class Areas:
    """Images for training on random areas, resized to one size. Indexing returns the centre crop, as for testing.

    Areas are taken from the original images, so that no resolution is lost.
    """

    source: Tensor | EncodedImages  # (N, C, H, W) uint8, or files of any sizes
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, size, size)."""
        return (self.source.shape[0], self.source.shape[1], self.size, self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.centres(indices)

    def centres(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """The centre crop of each image."""
        return self._apply(indices, lambda image: crops.middle(image, self.size), out)

    def draw(self, indices: Tensor, *key: int, out: Tensor | None = None) -> Tensor:
        """A random area of each image, which depends only on its index and on `key` (non-negative)."""
        remaining = iter(indices.tolist())  # images are processed in this order, each once
        return self._apply(indices, lambda image: crops.random_area(image, self.size, *key, next(remaining)), out)

    def _apply(self, indices: Tensor, use: Callable[[Image.Image], Image.Image], out: Tensor | None) -> Tensor:
        if isinstance(self.source, EncodedImages):
            return replace(self.source, size=(self.size, self.size)).decode(indices, use, out)
        return _copied_to(out, mapped(self.source[indices], use))


def _copied_to(out: Tensor | None, images: Tensor) -> Tensor:
    return images if out is None else out.copy_(images)


def mapped(images: Tensor, use: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply `use` to each image in memory, (N, C, H, W) uint8; the results have one size."""
    grey = images.shape[1] == 1
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    made = np.stack([np.asarray(use(Image.fromarray(a[..., 0] if grey else a))) for a in arrays])
    return torch.from_numpy(made.reshape(*made.shape[:3], -1)).permute(0, 3, 1, 2)


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels; item i is ((C, H, W) uint8, () int64).

    Args:
        images: (N, C, H, W) uint8, encoded images, or random areas of either.
        labels: (N,) int64.
    """

    images: Tensor | EncodedImages | Areas
    labels: Tensor

    def __init__(self, images: Tensor | EncodedImages | Areas, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are in memory."""
        images = self.images.source if isinstance(self.images, Areas) else self.images
        return isinstance(images, Tensor)

    @property
    def has_areas(self) -> bool:
        """Whether training uses random areas of the images, by `draw`."""
        return isinstance(self.images, Areas)

    def batch(self, indices: Sequence[int] | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((B, C, H, W) uint8, (B,) int64) of these items; images are written to `out` if given."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self.images, EncodedImages):
            images = self.images.decode(index, self.images.resized, out)
        elif isinstance(self.images, Areas):
            images = self.images.centres(index, out)
        else:
            images = _copied_to(out, self.images[index])
        return images, self.labels[index]

    def draw(self, indices: Sequence[int] | Tensor, *key: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((B, C, H, W) uint8, (B,) int64): a random area of each item, depending only on its index and `key`."""
        assert isinstance(self.images, Areas)
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self.images.draw(index, *key, out=out), self.labels[index]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([i])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of a batch, read together; called by `DataLoader`."""
        return list(zip(*self.batch(indices), strict=True))

    def subset(self, indices: Tensor) -> ImageSet:
        """The subset of these items (int64 indices); encoded images remain encoded."""
        if isinstance(self.images, EncodedImages):
            return ImageSet(replace(self.images, index=self.images.index[indices]), self.labels[indices])
        if isinstance(self.images, Areas):
            raise TypeError("take subsets before the images are cropped")
        return ImageSet(self.images[indices], self.labels[indices])
