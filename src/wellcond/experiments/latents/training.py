"""An adversarial training: both networks, their optimizers, the treatment and the averaged weights, and one step.

Lim and Ye, "Geometric GAN", 2017 (hinge loss); Mescheder, Geiger and Nowozin, "Which training methods for GANs do
actually converge?", ICML 2018 (R1), every few steps as in Karras et al., StyleGAN2, CVPR 2020 (lazy).

Latents and the order of the images depend on the seed and the step alone, so that the state at a step is all that a
resumed training needs to go on bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wellcond.experiments.data.draws import mixed_seed, permutation
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.errors import ConfigError, DataError, NonFiniteLossError
from wellcond.experiments.latents.config import LatentsConfig
from wellcond.experiments.latents.discriminator import Discriminator
from wellcond.experiments.latents.generator import EigenGenerator, Generator, PlainGenerator
from wellcond.experiments.run.config import NO_TREATMENT
from wellcond.experiments.run.training import first_non_finite_layer
from wellcond.orthogonality import parse_treatments, treat

BETAS = (0.5, 0.99)
WEIGHTS, SHOWN = 0, 1
"""What random numbers are for, besides the steps: the initial weights, and the latents of the pictures."""


class Losses(NamedTuple):
    """The losses of a step; the penalty is of the last step that had one."""

    discriminator: float
    generator: float
    r1: float


class AdversarialTraining:
    """A generator and a discriminator of `config` that learn from `images`.

    Attributes:
        step_count: steps done.
        generator, discriminator: the networks; `average` is the generator with averaged weights.
        treatment: of the layers with the directions, or None.

    Raises:
        DataError: fewer images than a batch.
        ConfigError: an unknown treatment, or one that does not act on these layers.
    """

    config: LatentsConfig
    images: ImageSet
    device: torch.device
    discriminator: Discriminator
    optimizers: dict[str, torch.optim.Adam]
    treatment: Any
    step_count: int

    def __init__(self, config: LatentsConfig, images: ImageSet, device: torch.device) -> None:
        if len(images) < config.batch_size:
            raise DataError(
                f"'{config.data}' has {len(images)} images, fewer than a batch of {config.batch_size}: take a smaller "
                "--batch-size"
            )
        self.config, self.images, self.device = config, images, device
        _, channels, size, _ = images.images.shape
        torch.manual_seed(mixed_seed(config.seed, WEIGHTS))
        widths = {"base_channels": config.base_channels, "max_channels": config.max_channels}
        self.generator: Generator
        if config.model == "eigengan":
            self.generator = EigenGenerator(size, channels, n_basis=config.n_basis, n_noise=config.noise, **widths)
        else:
            self.generator = PlainGenerator(size, channels, n_latents=config.latents, **widths)
        self.discriminator = Discriminator(size, channels, **widths)
        self.generator.to(device)
        self.discriminator.to(device)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=config.lr, betas=BETAS)
            for name, network in (("generator", self.generator), ("discriminator", self.discriminator))
        }
        self.treatment = self._treatment()
        averaging: Any = get_ema_multi_avg_fn(config.average)
        self._average = AveragedModel(self.generator, multi_avg_fn=averaging)  # a copy, after the treatment
        average: Any = self._average.module
        self.average: Generator = average
        self.average.requires_grad_(False)
        self.step_count, self._r1, self._order = 0, 0.0, (-1, torch.empty(0))

    def _treatment(self) -> Any:
        config = self.config
        if config.treat == NO_TREATMENT:
            return None
        layers, options = self.generator.directions(), {}
        try:
            if "ol" in parse_treatments(config.treat):
                count = config.latents if config.model == "plain" else config.n_basis
                # The form is 2‖UᵀU − I‖², summed over the layers; the weight is of the mean over entries and layers.
                options["ol"] = {"form": "double_soft", "coefficient": config.ol_weight / (2 * count**2 * len(layers))}
            optimizer = self.optimizers["generator"]
            return treat(self.generator, optimizer, config.treat, layers=list(layers), options=options)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def latents(self, count: int, *key: int) -> tuple[Tensor, Tensor]:
        """(count, n_latents) and (count, n_noise) standard normal numbers that depend on the seed and `key` alone."""
        drawing = torch.Generator().manual_seed(mixed_seed(self.config.seed, *key))
        whole = torch.randn(count, self.generator.n_latents + self.generator.n_noise, generator=drawing)
        z, noise = whole.to(self.device).split([self.generator.n_latents, self.generator.n_noise], 1)
        return z, noise

    def real(self, step: int) -> Tensor:
        """The images (B, C, H, W) of a step, scaled to [−1, 1]; every pass over all of them has its own order."""
        size = self.config.batch_size
        epoch, batch = divmod(step, len(self.images) // size)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.images), self.config.seed, epoch))
        images, _ = self.images.batch(self._order[1][batch * size : (batch + 1) * size])
        return images.to(self.device).float() / 127.5 - 1

    def step(self) -> Losses:
        """One step of the discriminator, then one of the generator.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; says in which step and layer.
        """
        for network in (self.generator, self.discriminator):
            network.train()
        real, count = self.real(self.step_count), self.config.batch_size
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            fake = self.generator(*self.latents(count, 2, self.step_count))
        loss_d = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()
        self._require_finite("discriminator", loss_d, self.discriminator, fake)
        penalty = self._gradient_penalty(real) if self.step_count % self.config.r1_every == 0 else 0.0
        self._update("discriminator", loss_d + penalty)
        self.discriminator.requires_grad_(False)
        z, noise = self.latents(count, 3, self.step_count)
        loss_g = -self.discriminator(self.generator(z, noise)).mean()
        self._require_finite("generator", loss_g, self.generator, z, noise)
        self._update("generator", loss_g + self.treatment.loss() if self.treatment is not None else loss_g)
        self._average.update_parameters(self.generator)
        self.step_count += 1
        return Losses(loss_d.item(), loss_g.item(), self._r1)

    def _update(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def _gradient_penalty(self, real: Tensor) -> Tensor:
        """γ/2 · E‖∇D‖² on real images, times the steps that it stands for."""
        real = real.requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
        squares = gradient.square().flatten(1).sum(1).mean()
        self._r1 = squares.item()
        self._require_finite("gradient penalty", squares, self.discriminator, real)
        return self.config.r1 / 2 * self.config.r1_every * squares

    def _require_finite(self, name: str, loss: Tensor, network: nn.Module, *inputs: Tensor) -> None:
        if torch.isfinite(loss):
            return
        layer = first_non_finite_layer(network, *inputs)
        where = f"first in the output of layer '{layer}'" if layer else "every layer's output is finite"
        raise NonFiniteLossError(
            f"training diverged at step {self.step_count}: the loss of the {name} is {loss.item()}, {where}. "
            f"Checkpoints remain; start afresh with a smaller --lr than {self.config.lr:g}, or a larger --r1 than "
            f"{self.config.r1:g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors and plain values."""
        return {
            "global_step": self.step_count,
            "r1": self._r1,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self._average.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "treatment": self.treatment.state_dict() if self.treatment is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the same configuration."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self._average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.treatment is not None:
            self.treatment.load_state_dict(state["treatment"])
        self.step_count, self._r1 = state["global_step"], state["r1"]
