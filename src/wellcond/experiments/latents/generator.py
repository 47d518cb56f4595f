"""Generators of images: EigenGAN-like, with a subspace of directions at every resolution, and a plain one.

He, Kan and Shan, "EigenGAN: Layer-Wise Eigen-Learning for GANs", ICCV 2021; Radford, Metz and Chintala, "Unsupervised
Representation Learning with Deep Convolutional GANs", ICLR 2016. Images are squares of 2^n pixels; channels double with
every halving of the image.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from wellcond.experiments.errors import ConfigError
from wellcond.nn import SubspaceLayer

SMALLEST = 4
"""Height and width of the first feature map."""
SLOPE = 0.2
"""Of the leaky ReLU, as usual in GANs."""


def resolutions(image_size: int) -> list[int]:
    """4, 8, … up to half of the image; a `ConfigError` if it is not such a power of two.

    Example:
        >>> resolutions(32)
        [4, 8, 16]
    """
    count = round(math.log2(max(image_size, 1) / SMALLEST))
    if count < 1 or SMALLEST << count != image_size:
        raise ConfigError(
            f"generators make images of 8, 16, 32, 64, 128, … pixels, got {image_size}: choose one by image_size"
        )
    return [SMALLEST << i for i in range(count)]


def widths(image_size: int, base: int, most: int) -> list[int]:
    """Channels at 4, 8, … and the full resolution, from many to `base`."""
    count = len(resolutions(image_size))
    return [min(most, base << (count - i)) for i in range(count + 1)]


class EigenBlock(nn.Module):
    """Adds a point of a learnt subspace of feature maps, and doubles the resolution: (N, c, r, r) to (N, c', 2r, 2r).

    The point is added before the up-sampling by a 1×1 convolution, and after it by a transposed one.
    """

    shape: tuple[int, int, int]
    subspace: SubspaceLayer
    before: nn.Conv2d
    after: nn.ConvTranspose2d
    enlarge: nn.ConvTranspose2d
    refine: nn.Conv2d
    act: nn.LeakyReLU

    def __init__(self, n_basis: int, in_channels: int, out_channels: int, resolution: int) -> None:
        super().__init__()
        self.shape = (in_channels, resolution, resolution)
        if n_basis > math.prod(self.shape):
            raise ConfigError(
                f"n_basis is {n_basis}, but a feature map of {in_channels} channels of {resolution}×{resolution} has "
                f"{math.prod(self.shape)} dimensions: take fewer directions, or more channels"
            )
        self.subspace = SubspaceLayer(n_basis, math.prod(self.shape))
        self.before = nn.Conv2d(in_channels, in_channels, 1)
        self.after = doubling(in_channels, out_channels)
        self.enlarge = doubling(in_channels, out_channels)
        self.refine = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        point = self.subspace(z).unflatten(-1, self.shape)
        h = self.enlarge(self.act(h + self.before(point)))
        return self.refine(self.act(h + self.after(point)))


class Generator(nn.Module):
    """Base of the generators: `forward(z, noise)` of (N, n_latents) and (N, n_noise) gives (N, C, H, W) in (−1, 1).

    Attributes:
        n_latents: latent variables with a direction each.
        n_noise: further ones, whose directions are not studied.
        direction_layers: names of the layers whose columns are the directions, which treatments act on.
    """

    n_latents: int
    n_noise: int
    direction_layers: tuple[str, ...]

    def directions(self) -> dict[str, nn.Module]:
        """The layers with the directions, by name."""
        return {name: self.get_submodule(name) for name in self.direction_layers}

    def _require(self, z: Tensor, noise: Tensor) -> None:
        for what, given, count in (("latents", z, self.n_latents), ("noise", noise, self.n_noise)):
            if given.ndim != 2 or given.shape[1] != count:
                raise ValueError(f"{what} must be (N, {count}), got {tuple(given.shape)}")


class EigenGenerator(Generator):
    """A generator whose latent variables act at every resolution, through a subspace of feature maps each.

    Args:
        image_size: 8, 16, 32, …
        channels: of the images.
        n_basis: directions at each resolution.
        n_noise: dimensions of the noise from which the first feature map is made.
        base_channels, max_channels: channels at full resolution, and at most.

    Raises:
        ConfigError: another size, or more directions than a feature map has dimensions.
    """

    n_basis: int
    n_noise: int
    n_latents: int
    start: nn.Sequential
    blocks: nn.ModuleList
    paint: nn.Sequential
    direction_layers: tuple[str, ...]

    def __init__(
        self, image_size: int, channels: int, *, n_basis: int, n_noise: int, base_channels: int, max_channels: int
    ) -> None:
        super().__init__()
        sizes, wide = resolutions(image_size), widths(image_size, base_channels, max_channels)
        self.n_basis, self.n_noise, self.n_latents = n_basis, n_noise, n_basis * len(sizes)
        self.start = nn.Sequential(nn.Linear(n_noise, wide[0] * SMALLEST**2), _maps(wide[0]))
        self.blocks = nn.ModuleList(
            EigenBlock(n_basis, before, after, size)
            for (before, after), size in zip(pairwise(wide), sizes, strict=True)
        )
        self.paint = nn.Sequential(nn.LeakyReLU(SLOPE), nn.Conv2d(wide[-1], channels, 3, padding=1), nn.Tanh())
        self.direction_layers = tuple(f"blocks.{i}.subspace" for i in range(len(sizes)))
        initialise(self)

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        self._require(z, noise)
        h = self.start(noise)
        for block, part in zip(self.blocks, z.split(self.n_basis, 1), strict=True):
            h = block(h, part)
        return self.paint(h)


class PlainGenerator(Generator):
    """A generator from one latent vector, whose directions are the columns of the first weight.

    Args:
        image_size, channels, base_channels, max_channels: as in :class:`EigenGenerator`.
        n_latents: latent variables.

    Raises:
        ConfigError: another size, or more latent variables than the first feature map has dimensions.
    """

    n_latents: int
    n_noise: int
    direction_layers: tuple[str, ...]
    start: nn.Sequential
    body: nn.Sequential
    paint: nn.Sequential

    def __init__(
        self, image_size: int, channels: int, *, n_latents: int, base_channels: int, max_channels: int
    ) -> None:
        super().__init__()
        wide = widths(image_size, base_channels, max_channels)
        self.n_latents, self.n_noise, self.direction_layers = n_latents, 0, ("start.0",)
        if n_latents > (dim := wide[0] * SMALLEST**2):
            raise ConfigError(f"{n_latents} latents, but the first feature map has {dim} dimensions: take fewer")
        layers: list[nn.Module] = []
        for pair in pairwise(wide):
            layers += [nn.LeakyReLU(SLOPE), doubling(*pair)]
        self.start = nn.Sequential(nn.Linear(n_latents, dim), _maps(wide[0]))
        self.body = nn.Sequential(*layers)
        self.paint = nn.Sequential(nn.LeakyReLU(SLOPE), nn.Conv2d(wide[-1], channels, 3, padding=1), nn.Tanh())
        initialise(self)

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        self._require(z, noise)
        return self.paint(self.body(self.start(z)))


def _maps(channels: int) -> nn.Module:
    return nn.Unflatten(1, (channels, SMALLEST, SMALLEST))


def doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution that doubles height and width; every output pixel sees 2×2 inputs."""
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Keep the variance of activations through a leaky ReLU: N(0, 2/((1 + slope²) fan_in)), biases 0.

    He, Zhang, Ren and Sun, "Delving deep into rectifiers", ICCV 2015. Subspaces keep their own start.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):  # weight (in, out, k, k); each output sees k²/stride² inputs
                stride = module.stride[0] * module.stride[1]
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1] // stride
            module.weight.normal_(0.0, math.sqrt(2 / ((1 + SLOPE**2) * fan_in)))
            assert module.bias is not None
            module.bias.zero_()
