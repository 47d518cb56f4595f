"""Images still in their files' encoding, decoded row by row from a Hugging Face data set."""

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

_CHUNK = 1000  # rows read from Arrow at once: large against its overhead, small against memory
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImages:
    """Images still in their files' encoding; indexing with a 1-D int64 tensor decodes to (B, C, H, W) uint8."""

    table: datasets.Dataset  # with the format "arrow"
    column: str  # of the table, a `datasets.Image(decode=False)`
    index: Tensor  # (N,) int64, the rows of the table that belong to this set
    place: str  # what error messages call it, such as "'DIR', split 'train'"
    channels: int = 3  # 1 or 3
    bits: int = 8  # that greys of more than 8 bits use
    size: tuple[int, int] = (0, 0)  # (H, W) of every image
    share: float | None = None
    """Bring the middle of an image, so much of its shorter side, to `size`; None: one of another size is an error."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.index), self.channels, *self.size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.decode(indices, self.as_asked)

    def as_asked(self, image: Image.Image) -> Image.Image:
        """The middle of an image at `size`, or the image as it is."""
        return image if self.share is None else pixels.fitted(image, self.size, self.share)

    def decode(self, indices: Tensor, use: Callable[[Image.Image], Image.Image], out: Tensor | None = None) -> Tensor:
        """What `use` makes of each of these images, which must be of `size`; in the memory format of files, (H, W, C).

        Not copied to (C, H, W), which takes a fifth of the time of decoding. `use` gets grey or RGB of 8 bits. `out` is
        written if it is given, (B, C, H, W) in that memory format.
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
            return pixels.opened(_contents(path) if data is None else data, use)
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


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:  # a `Path` takes as long as the reading
        return file.read()
