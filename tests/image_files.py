"""Images as files, in parquet and in folders, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def pictures(n: int, seed: int, size: tuple[int, int] = (6, 6), channels: int = 3) -> np.ndarray:
    """(n, C, H, W) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, channels, *size), dtype=np.uint8)


def picture_file(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """One (C, H, W) or (H, W) image as the bytes of a file."""
    pixels = pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    files: list[bytes | None],
    labels: Any,
    *,
    image: str = "image",
    label: str = "label",
    label_feature: dict[str, Any] | None = None,
    described: bool = True,
) -> None:
    """A parquet file as on the hub; `described` adds the schema that says which column is what."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{i}.png"} if data is not None else None for i, data in enumerate(files)]
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if described:
        features = {
            image: {"_type": "Image"},
            label: label_feature or {"_type": "ClassLabel", "names": list(CLASSES)},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def as_files(images: np.ndarray) -> list[bytes | None]:
    return [picture_file(image) for image in images]


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """One image as a file of the kind that its ending says, in folders made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_file(pixels))
    return path


def write_classes(root: Path, *folders: str, each: int = 10, size: tuple[int, int] = (6, 6)) -> Path:
    """Folders of images that are all different."""
    for number, folder in enumerate(folders):
        for i, pixels in enumerate(pictures(each, 100 + number, size)):
            write_image(root / folder / f"{i}.png", pixels)
    return root
