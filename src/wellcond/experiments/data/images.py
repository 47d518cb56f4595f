"""Labelled 8-bit images, in memory or decoded row by row from a Hugging Face data set, behind one interface."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
_GREY_MODES = frozenset({"1", "L", "LA", "La"})


@dataclass(frozen=True)
class EncodedImages:
    """Images still in their files' encoding; indexing with a 1-D int64 tensor decodes to (B, C, H, W) uint8.

    Attributes:
        table: a data set whose column `column` is a `datasets.Image(decode=False)`.
        index: (N,) int64, the rows of the table that belong to this set.
        place: what error messages call it, such as "'DIR', split 'train'".
        channels: 1 or 3.
        size: (H, W) of every image.
        resize: scale the shorter side and crop the middle, so that images of any size come out as `size`;
            otherwise an image of another size is an error.
    """

    table: datasets.Dataset
    column: str
    index: Tensor
    place: str
    channels: int = 3
    size: tuple[int, int] = (0, 0)
    resize: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.index), self.channels, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), self.channels, *self.size, dtype=torch.uint8)
        for position, (row, encoded) in enumerate(self._rows(indices)):
            out[position] = self._decode(row, encoded)
        return out

    def take(self, indices: Tensor) -> EncodedImages:
        """Those images only, still encoded."""
        return replace(self, index=self.index[indices])

    def all_grey(self) -> bool:
        """Whether every image has one channel (reads headers only, up to the first coloured one)."""
        return all(mode in _GREY_MODES for _, mode, _ in self._headers(torch.arange(len(self.index))))

    def first_size(self) -> tuple[int, int]:
        """(H, W) of the first image."""
        return next(self._headers(torch.tensor([0])))[2]

    def check_sizes(self, most: int) -> None:
        """Raise a `DataError` if any of `most` images spread over the set is not of the size of the set."""
        some = torch.linspace(0, len(self.index) - 1, min(most, len(self.index))).long()
        for row, _, size in self._headers(some):
            self._check_size(row, size)

    def _rows(self, indices: Tensor) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(row number, {"bytes", "path"}) of each of these images."""
        arrow = self.table.with_format("arrow")
        for chunk in self.index[indices].split(_CHUNK):
            rows: list[int] = chunk.tolist()
            yield from zip(rows, arrow[rows][self.column].to_pylist(), strict=True)

    def _headers(self, indices: Tensor) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """(row number, mode, (H, W)) of each of these images; their pixels are not decoded."""
        for row, encoded in self._rows(indices):
            yield self._read(row, encoded, lambda image, row=row: (row, image.mode, (image.height, image.width)))

    def _decode(self, row: int, encoded: dict[str, Any] | None) -> Tensor:
        """One image as (C, H, W) uint8."""
        mode, (height, width) = "L" if self.channels == 1 else "RGB", self.size

        def pixels_of(image: Image.Image) -> tuple[tuple[int, int], bytearray]:
            if image.mode != mode:
                image = image.convert(mode)
            if self.resize and image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            return (image.height, image.width), bytearray(image.tobytes())

        found, pixels = self._read(row, encoded, pixels_of)
        self._check_size(row, found)
        return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, self.channels).permute(2, 0, 1)

    def _read(self, row: int, encoded: dict[str, Any] | None, use: Callable[[Image.Image], T]) -> T:
        """What `use` makes of one image, upright as its EXIF says; whatever fails becomes a `DataError`."""
        data, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
        if data is None and path is None:
            raise DataError(f"{self.place}: row {row} has no image; remove the row")
        try:
            image = Image.open(io.BytesIO(Path(path).read_bytes() if data is None else data))  # pyright: ignore[reportArgumentType]
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

    def __repr__(self) -> str:
        n, c, h, w = self.images.shape
        return f"ImageSet({n} images {c}×{h}×{w}, {'in memory' if self.in_memory else 'decoded when read'})"

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
        """The set of these items only (int64 indices)."""
        images = self.images[indices] if isinstance(self.images, Tensor) else self.images.take(indices)
        return ImageSet(images, self.labels[indices])


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
    channels = 1 if all(images.all_grey() for images in encoded) else 3
    size = (image_size, image_size) if image_size else encoded[0].first_size()
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
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    out = images.new_empty(*images.shape[:2], image_size, image_size)
    for i, c in itertools.product(range(images.shape[0]), range(images.shape[1])):
        plane = Image.fromarray(images[i, c].numpy())
        plane = ImageOps.fit(plane, (image_size, image_size), Image.Resampling.BILINEAR)
        out[i, c] = torch.frombuffer(bytearray(plane.tobytes()), dtype=torch.uint8).view(image_size, image_size)
    return out
