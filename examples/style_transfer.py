"""Style transfer without a network: whitening and colouring of overlapping patches of two photographs.

Universal style transfer (Li et al., NeurIPS 2017) gives the features of one picture the mean and covariance of those of
another, and decodes them. The features here are the 5 × 5 patches themselves, 75 numbers at every position: their
covariance holds the colours of a picture and its finest texture. The decoder lays the patches back and averages where
they overlap, which undoes the encoder exactly.

    python examples/style_transfer.py --out style_transfer.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import fold, unfold

from wellcond.nn import WhiteningColoring

SIDE = 5
"""Pixels of a patch's side."""
EPS = 1e-3
"""In units of the mean eigenvalue: the darkest directions of patches are sensor noise, and are not to be amplified."""


def encode(picture: Tensor) -> Tensor:
    """All patches of a picture (1, 3, H, W), as (1, 3·SIDE², positions)."""
    return unfold(picture, SIDE)


def decode(patches: Tensor, size: torch.Size) -> Tensor:
    """The picture (1, 3, *size) whose patches these are, each pixel the mean of the patches that hold it."""
    return fold(patches, size, SIDE) / fold(torch.ones_like(patches), size, SIDE)


def transfer(content: Tensor, style: Tensor, alpha: float) -> Tensor:
    """Content (1, 3, H, W) in [0, 1] in the style of another picture; α = 0 is the content, 1 all of the style."""
    layer = WhiteningColoring(EPS, alpha=alpha, relative=True)
    return decode(layer(encode(content), encode(style)), content.shape[-2:]).clamp(0, 1)


def photographs(width: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's two sample photographs, a temple and a flower, as (1, 3, H, W) in [0, 1]."""
    pictures = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)
    return pictures[0], pictures[1]


def sheet(rows: list[list[Tensor]], gap: int = 4) -> Image.Image:
    """Pictures of one size in rows and columns on white."""
    white = torch.nn.functional.pad
    lines = [torch.cat([white(p, (0, gap, 0, gap), value=1.0) for p in row], -1) for row in rows]
    pixels = (torch.cat(lines, -2)[0, :, :-gap, :-gap] * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("style_transfer.png"))
    parser.add_argument("--width", type=int, default=240, help="of each picture, in pixels")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 0.6, 1.0])
    options = parser.parse_args()
    temple, flower = photographs(options.width)
    rows = [[c, s, *(transfer(c, s, a) for a in options.alphas)] for c, s in ((temple, flower), (flower, temple))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture = sheet(rows)
    # 256 dithered colours keep the file small.
    palette = picture.quantize(256)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(options.out, optimize=True)
    print(f"{options.out}: content, style, and the content in that style at α = {options.alphas}")


if __name__ == "__main__":
    main()
