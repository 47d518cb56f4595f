"""Encoded images of a Hugging Face data set, decoded on access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from wellcond.experiments.data import pixels
from wellcond.experiments.errors import DataError, needs_train_extra

with needs_train_extra():
    from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import datasets

_CHUNK = 1000  # rows read from Arrow at once
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images; indexing with a 1-D int64 tensor decodes to (B, C, H, W) uint8."""

    table: datasets.Dataset  # with the format "arrow"
    column: str  # of the table, a `datasets.Image(decode=False)`
    index: Tensor  # (N,) int64, the rows of the table that belong to this set
    place: str  # for error messages, such as "'DIR', split 'train'"
    channels: int = 3  # 1 or 3
    bits: int = 8  # of greyscale images with more than 8 bits
    size: tuple[int, int] = (0, 0)  # (H, W) of every image
    share: float | None = None
    """Resize the centre crop with this share of the shorter side to `size`; None: other sizes are an error."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.index), self.channels, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.decode(indices, self.resized)

    def resized(self, image: Image.Image) -> Image.Image:
        """The centre crop resized to `size`, or the image unchanged if `share` is None."""
        return image if self.share is None else pixels.fitted(image, self.size, self.share)

    def decode(self, indices: Tensor, use: Callable[[Image.Image], Image.Image], out: Tensor | None = None) -> Tensor:
        """Decode these images and apply `use`, whose results must have `size`: (B, C, H, W), channels last in memory.

        They are not made contiguous, which would add a fifth to the decoding time. `use` receives 8-bit greyscale or
        RGB. If given, `out` is filled, and must have the same memory format.
        """

        def pixels_of(image: Image.Image) -> np.ndarray:
            return np.asarray(use(pixels.eight_bits(image, self.channels, self.bits)))

        if out is None:
            out = torch.empty(len(indices), *self.size, self.channels, dtype=torch.uint8).permute(0, 3, 1, 2)
        arrays = out.permute(0, 2, 3, 1).numpy()
        arrays = arrays[..., 0] if self.channels == 1 else arrays
        for position, (row, found) in enumerate(self.read(indices, pixels_of)):
            self._check_size(row, (found.shape[0], found.shape[1]))
            arrays[position] = found
        return out

    def spread(self, most: int = _CHUNK) -> Tensor:
        """Indices of up to `most` images, evenly spaced."""
        return torch.linspace(0, len(self.index) - 1, min(most, len(self.index))).long()

    def check_sizes(self) -> None:
        """Raise a `DataError` if any of a sample of images does not have the size of the set."""
        for row, size in self.read(self.spread(), pixels.size):
            self._check_size(row, size)

    def read(
        self, indices: Tensor, use: Callable[[Image.Image], T], broken: list[str] | None = None
    ) -> Iterator[tuple[int, T]]:
        """The row of each image and the result of `use` (see `pixels.opened`).

        Unreadable images raise a `DataError`, or are skipped if `broken` is given, to which the message is added.
        """
        for chunk in self.index[indices].split(_CHUNK):
            rows: list[int] = chunk.tolist()
            for row, encoded in zip(rows, self.table[rows][self.column].to_pylist(), strict=True):
                found = self._read(row, encoded or {}, use)
                if not isinstance(found, DataError):
                    yield row, found
                elif broken is None:
                    raise found from found.__cause__
                else:
                    broken.append(str(found))

    def _read(self, row: int, encoded: dict[str, Any], use: Callable[[Image.Image], T]) -> T | DataError:
        data, path = encoded.get("bytes"), encoded.get("path") or ""
        if data is None and not path:
            return DataError(f"{self.place}: row {row} has no image; remove the row")
        try:
            return pixels.opened(path if data is None else data, use)
        except Exception as error:  # any type: OSError, SyntaxError, ValueError, struct.error, …
            name = f" ('{path}')" if path else ""
            unknown = isinstance(error, UnidentifiedImageError)  # its message contains a memory address
            why = "not an image format known to Pillow" if unknown else error or type(error).__name__
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
