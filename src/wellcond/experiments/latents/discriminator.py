"""The discriminator: convolutions of stride 2 down to 4×4, then one number for each image."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from wellcond.experiments.latents.generator import SLOPE, SMALLEST, initialise, widths


class Discriminator(nn.Module):
    """Scores images (N, C, H, W), high where they look real; (N,).

    Args:
        image_size: 8, 16, 32, …
        channels: of the images.
        base_channels, max_channels: channels at full resolution, and at most.

    Raises:
        ConfigError: another size. In a forward pass `ValueError`: images of another size or channels.
    """

    shape: tuple[int, int, int]
    layers: nn.Sequential
    score: nn.Sequential

    def __init__(self, image_size: int, channels: int, *, base_channels: int, max_channels: int) -> None:
        super().__init__()
        self.shape = (channels, image_size, image_size)
        wide = widths(image_size, base_channels, max_channels)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(channels, wide[0], 3, padding=1), nn.LeakyReLU(SLOPE)]
        for pair in pairwise(wide):
            layers += [nn.Conv2d(*pair, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.score = nn.Sequential(
            nn.Linear(wide[-1] * SMALLEST**2, wide[-1]), nn.LeakyReLU(SLOPE), nn.Linear(wide[-1], 1)
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"the discriminator is of images (N, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}; "
                "resize them, or make another discriminator"
            )
        return self.score(self.layers(images))[:, 0]
