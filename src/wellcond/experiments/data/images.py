"""Labelled 8-bit images, in memory or decoded row by row from a Hugging Face data set, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wellcond.experiments.data import pixels
from wellcond.experiments.errors import DataError, needs_train_extra

with needs_train_extra():
    from PIL import Image, UnidentifiedImageError

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
    bits: int = 8  # that greys of more than 8 bits use
    size: tuple[int, int] = (0, 0)  # (H, W) of every image
    resize: bool = False
    """Scale the shorter side and crop the middle, to `size`; otherwise an image of another size is an error."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.index), self.channels, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        def decode(image: Image.Image) -> np.ndarray:
            image = pixels.eight_bits(image, self.channels, self.bits)
            return np.array(pixels.fitted(image, self.size) if self.resize else image)

        out = torch.empty(len(indices), self.channels, *self.size, dtype=torch.uint8)
        for position, (row, found) in enumerate(self.read(indices, decode)):
            self._check_size(row, (found.shape[0], found.shape[1]))
            out[position] = torch.from_numpy(found).view(*self.size, self.channels).permute(2, 0, 1)
        return out

    def spread(self, most: int = _CHUNK) -> Tensor:
        """Indices of up to so many images, spread over the set."""
        return torch.linspace(0, len(self.index) - 1, min(most, len(self.index))).long()

    def check_sizes(self) -> None:
        """Raise a `DataError` if any of some images spread over the set is not of the size of the set."""
        for row, size in self.read(self.spread(), pixels.size):
            self._check_size(row, size)

    def read(
        self, indices: Tensor, use: Callable[[Image.Image], T], broken: list[str] | None = None
    ) -> Iterator[tuple[int, T]]:
        """The row of each of these images, and what `use` makes of it (see `pixels.opened`).

        What cannot be read becomes a `DataError`, or is left out and its message added to `broken`.
        """
        arrow = self.table.with_format("arrow")
        for chunk in self.index[indices].split(_CHUNK):
            rows: list[int] = chunk.tolist()
            for row, encoded in zip(rows, arrow[rows][self.column].to_pylist(), strict=True):
                found = self._read(row, encoded or {}, use)
                if not isinstance(found, DataError):
                    yield row, found
                elif broken is None:
                    raise found from found.__cause__
                else:
                    broken.append(str(found))

    def _read(self, row: int, encoded: dict[str, Any], use: Callable[[Image.Image], T]) -> T | DataError:
        data, path = encoded.get("bytes"), encoded.get("path")
        if data is None and not path:
            return DataError(f"{self.place}: row {row} has no image; remove the row")
        try:
            return pixels.opened(Path(path or "").read_bytes() if data is None else data, use)
        except Exception as error:  # of any kind: OSError, SyntaxError, ValueError, struct.error, …
            name = f" ('{path}')" if path else ""
            unknown = isinstance(error, UnidentifiedImageError)  # whose message shows the buffer's address
            why = "not an image of a kind that Pillow knows" if unknown else error or type(error).__name__
            failed = DataError(
                f"{self.place}: image {row}{name} cannot be decoded ({why}); replace the file or remove the row"
            )
            failed.__cause__ = error
            return failed

    def _check_size(self, row: int, size: tuple[int, int]) -> None:
        if size != self.size:
            raise DataError(
                f"{self.place}: image {row} is {size[0]}×{size[1]} pixels (height×width) where "
                f"{self.size[0]}×{self.size[1]} was expected from the first image; bring all images to one size by "
                "--image-size N (image_size=N)"
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


def settle(sets: Sequence[ImageSet], image_size: int | None, memory_budget: int) -> tuple[list[ImageSet], list[str]]:
    """Give several sets one image shape, and decode them into memory if together they fit `memory_budget` bytes.

    Decoding takes about 0.1 ms an image of 32×32; threads do not help images this small (Pillow holds the
    interpreter's lock for most of that time), worker processes of the loader do for what is decoded later.

    Returns:
        The sets, and notes on what was done to the pixels.

    Raises:
        DataError: images differ in size and `image_size` is None, or one cannot be decoded.
    """
    encoded = [s.images for s in sets if isinstance(s.images, EncodedImages)]
    if not encoded:
        return [ImageSet(_resized(s.images, image_size), s.labels) for s in sets if isinstance(s.images, Tensor)], []
    modes = {mode for images in encoded for _, mode in images.read(torch.arange(len(images.index)), pixels.mode)}
    channels, (bits, notes) = pixels.channels(modes), grey_depth(encoded, modes)
    _, first_size = next(encoded[0].read(torch.tensor([0]), pixels.size))
    size = (image_size, image_size) if image_size else first_size
    fits = sum(map(len, sets)) * channels * size[0] * size[1] <= memory_budget
    settled = []
    for images, labels in zip(encoded, (s.labels for s in sets), strict=True):
        images = replace(images, channels=channels, bits=bits, size=size, resize=image_size is not None)
        if not fits and not images.resize:
            images.check_sizes()  # now, rather than in the middle of the training
        settled.append(ImageSet(images[torch.arange(len(labels))] if fits else images, labels))
    return settled, notes


def grey_depth(
    sets: Sequence[EncodedImages], modes: Iterable[str], broken: list[str] | None = None
) -> tuple[int, list[str]]:
    """The bits that greys of more than 8 have in use, told from some images of each set; and a note on that."""
    if not any(mode.startswith("I") for mode in modes):
        return 8, []
    found = (bits for images in sets for _, bits in images.read(images.spread(), pixels.grey_bits, broken))
    bits = max(found, default=8)
    return bits, [f"greys of {bits} bits: the uppermost 8 are used"] if bits > 8 else []


def _resized(images: Tensor, image_size: int | None) -> Tensor:
    """In-memory images brought to a square of `image_size`, by the same rule as files."""
    if image_size is None:
        return images
    fitted = (pixels.fitted(Image.fromarray(plane), (image_size, image_size)) for plane in images.flatten(0, 1).numpy())
    return torch.from_numpy(np.stack([np.array(plane) for plane in fitted])).unflatten(0, images.shape[:2])
