"""Labelled 8-bit images, in memory or decoded row by row from a Hugging Face data set, behind one interface."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wellcond.experiments.errors import DataError, needs_train_extra

with needs_train_extra():
    from PIL import Image, ImageOps

if TYPE_CHECKING:
    import datasets

_CHUNK = 1000  # rows read from Arrow at once: large against its overhead, small against memory
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImages:
    """Images still in their files' encoding; indexing with a 1-D int64 tensor decodes to (B, C, H, W) uint8."""

    table: datasets.Dataset
    column: str  # of the table, a `datasets.Image(decode=False)`
    index: Tensor  # (N,) int64, the rows of the table that belong to this set
    place: str  # what error messages call it, such as "'DIR', split 'train'"
    channels: int = 3  # 1 or 3
    size: tuple[int, int] = (0, 0)  # (H, W) of every image
    resize: bool = False
    """Scale the shorter side and crop the middle, to `size`; otherwise an image of another size is an error."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.index), self.channels, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        def decode(image: Image.Image) -> np.ndarray:
            image = image.convert("L" if self.channels == 1 else "RGB")
            return _fitted(image, self.size) if self.resize else np.array(image)

        out = torch.empty(len(indices), self.channels, *self.size, dtype=torch.uint8)
        for position, (row, pixels) in enumerate(self.read(indices, decode)):
            self._check_size(row, (pixels.shape[0], pixels.shape[1]))
            out[position] = torch.from_numpy(pixels).view(*self.size, self.channels).permute(2, 0, 1)
        return out

    def check_sizes(self, most: int) -> None:
        """Raise a `DataError` if any of `most` images spread over the set is not of the size of the set."""
        some = torch.linspace(0, len(self.index) - 1, min(most, len(self.index))).long()
        for row, size in self.read(some, _size):
            self._check_size(row, size)

    def read(self, indices: Tensor, use: Callable[[Image.Image], T]) -> Iterator[tuple[int, T]]:
        """The row of each of these images, and what `use` makes of it.

        The image is upright as its EXIF says, and decoded only if `use` looks at the pixels. Whatever fails becomes
        a `DataError`.
        """
        arrow = self.table.with_format("arrow")
        for chunk in self.index[indices].split(_CHUNK):
            rows: list[int] = chunk.tolist()
            for row, encoded in zip(rows, arrow[rows][self.column].to_pylist(), strict=True):
                yield row, self._read(row, encoded or {}, use)

    def _read(self, row: int, encoded: dict[str, Any], use: Callable[[Image.Image], T]) -> T:
        data, path = encoded.get("bytes"), encoded.get("path")
        if data is None and not path:
            raise DataError(f"{self.place}: row {row} has no image; remove the row")
        try:
            image = Image.open(io.BytesIO(Path(path or "").read_bytes() if data is None else data))
            if not image.mode.startswith(("I", "F")):
                return use(ImageOps.exif_transpose(image) if image.info.get("exif") else image)
        except Exception as error:  # of any kind: OSError, SyntaxError, ValueError, struct.error, …
            name = f" ('{path}')" if path else ""
            raise DataError(
                f"{self.place}: image {row}{name} cannot be decoded ({error or type(error).__name__}); "
                "replace the file or remove the row"
            ) from error
        # Converting 16- or 32-bit greys to 8 bits would clip them.
        raise DataError(f"{self.place}: image {row} has pixels of mode '{image.mode}'; save it with 8 bits a channel")

    def _check_size(self, row: int, size: tuple[int, int]) -> None:
        if size != self.size:
            raise DataError(
                f"{self.place}: image {row} is {size[0]}×{size[1]} pixels (height×width) where "
                f"{self.size[0]}×{self.size[1]} was expected from the first image; "
                "give image_size to bring all images to one size"
            )


def _size(image: Image.Image) -> tuple[int, int]:
    return image.height, image.width


def _fitted(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The image scaled to the shorter side of (H, W), its middle cropped."""
    return np.array(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR))


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels; item i is ((C, H, W) uint8, () int64).

    Args:
        images: (N, C, H, W) uint8, or the same still encoded.
        labels: (N,) int64.
    """

    def __init__(self, images: Tensor | EncodedImages, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are held in memory."""
        return isinstance(self.images, Tensor)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """((B, C, H, W) uint8, (B,) int64) of these items."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[index], self.labels[index]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([i])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of a whole batch read at once: what a `DataLoader` calls where it exists."""
        return list(zip(*self.batch(indices), strict=True))

    def subset(self, indices: Tensor) -> ImageSet:
        """The set of these items only (int64 indices), encoded images still so."""
        if isinstance(self.images, Tensor):
            return ImageSet(self.images[indices], self.labels[indices])
        return ImageSet(replace(self.images, index=self.images.index[indices]), self.labels[indices])


def settle(sets: Sequence[ImageSet], image_size: int | None, memory_budget: int) -> list[ImageSet]:
    """Give several sets one image shape, and decode them into memory if together they fit `memory_budget` bytes.

    Decoding takes about 0.1 ms an image of 32×32; threads do not help images this small (Pillow holds the
    interpreter's lock for most of that time), worker processes of the loader do for what is decoded later.

    Raises:
        DataError: images differ in size and `image_size` is None, or one cannot be decoded.
    """
    encoded = [s.images for s in sets if isinstance(s.images, EncodedImages)]
    if not encoded:
        return [ImageSet(_resized(s.images, image_size), s.labels) for s in sets if isinstance(s.images, Tensor)]
    modes = (mode for images in encoded for _, mode in images.read(torch.arange(len(images.index)), lambda i: i.mode))
    channels = 1 if all(mode in ("1", "L", "LA", "La") for mode in modes) else 3
    _, first_size = next(encoded[0].read(torch.tensor([0]), _size))
    size = (image_size, image_size) if image_size else first_size
    fits = sum(map(len, sets)) * channels * size[0] * size[1] <= memory_budget
    settled = []
    for images, labels in zip(encoded, (s.labels for s in sets), strict=True):
        images = replace(images, channels=channels, size=size, resize=image_size is not None)
        if not fits and not images.resize:
            images.check_sizes(_CHUNK)  # now, rather than in the middle of the training
        settled.append(ImageSet(images[torch.arange(len(labels))] if fits else images, labels))
    return settled


def _resized(images: Tensor, image_size: int | None) -> Tensor:
    """In-memory images brought to a square of `image_size`, by the same rule as files."""
    if image_size is None:
        return images
    planes = [_fitted(Image.fromarray(plane), (image_size, image_size)) for plane in images.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(planes)).unflatten(0, images.shape[:2])
