"""Grids of images as PNG: samples, and traversals of the latent directions."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.files import write_atomically
from wellcond.experiments.latents.generator import Generator

with needs_train_extra():
    from PIL import Image

GAP = 2
"""Pixels between images."""
FARTHEST = 3.0
"""Traversals go from −3 to 3 standard deviations."""


def grid(images: Tensor, columns: int) -> Tensor:
    """(C, H', W') uint8 of images (N, C, H, W) in [−1, 1], row by row on white."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8)
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write the grid as a PNG, atomically; small images are enlarged by whole numbers."""
    sheet = grid(images, columns).permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    if (factor := 64 // images.shape[-1]) > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    data = io.BytesIO()
    picture.save(data, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


@torch.no_grad()
def traversal(generator: Generator, z: Tensor, noise: Tensor, columns: int = 7) -> Tensor:
    """(n_latents · columns, C, H, W): row i has the image of (z, noise), (1, …) each, with z_i from −3 to 3."""
    rows = []
    for i in range(generator.n_latents):
        moved = z.repeat(columns, 1)
        moved[:, i] = torch.linspace(-FARTHEST, FARTHEST, columns)
        rows.append(generator(moved, noise.expand(columns, -1)))
    return torch.cat(rows)
