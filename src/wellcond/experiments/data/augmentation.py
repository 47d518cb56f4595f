"""What is done to a batch on its device: normalised always, cropped and mirrored at random in training.

As usual for CIFAR since He et al., "Deep residual learning" (CVPR 2016), section 4.2: a border of an eighth of the
image (4 of 32 pixels) is added, a window of the old size is taken from it at random, and half of the images are
mirrored. Cropping and flipping are kornia's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellcond.experiments.data.draws import mixed_seed
from wellcond.experiments.errors import needs_train_extra


class BatchAugmentation(nn.Module):
    """uint8 batches (B, C, H, W) to normalised float32 batches, augmented on request.

    Args:
        mean, std: (C,) float32 of the pixels of the training images, in units of 0 to 255.
        flip: whether a mirror image belongs to the same class.
        border: take windows of the image with a border; not where it is a random area of a photograph already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, *, flip: bool, border: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        self.flip, self.border = flip, border

    def forward(self, images: Tensor) -> Tensor:
        """(pixels − mean) / std as float32, without augmentation."""
        return (images.float() - self.mean) / self.std

    def augment(self, images: Tensor, *key: int) -> Tensor:
        """Cropped, flipped and normalised, with random numbers that depend on `key` (non-negative) alone.

        The numbers are drawn on the CPU, so they are the same on every device; torch's own generator is left
        as it was. Takes 5 ms for 128 × 3 × 32 × 32 on one CPU core.
        """
        with needs_train_extra():
            import kornia.augmentation as K

        height, width = images.shape[-2:]
        border = (max(1, round(width / 8)), max(1, round(height / 8)))  # left and right, top and bottom
        crop = K.RandomCrop((height, width), padding=border, cropping_mode="slice") if self.border else nn.Identity()
        flip = K.RandomHorizontalFlip(p=0.5 if self.flip else 0.0)
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(mixed_seed(*key))
        try:
            return self(flip(crop(images.float())))
        finally:
            torch.set_rng_state(before)
