"""The configuration of a generator's training.

The defaults are those of the EigenGAN experiments of Song, Sebe and Wang (TPAMI 2022) and He, Kan and Shan (ICCV 2021):
six directions for each resolution, 16 channels at the last one and at most 512, noise of 512 dimensions, hinge loss
with R1 = 10 every 16 steps, Adam with betas (0.5, 0.99) at 1e-4 for both networks, batches of 64. This module must not
import torch, so that `wellcond --help` is fast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from wellcond._shared.names import listed, require_known
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.config import NO_TREATMENT

MODELS = ("eigengan", "plain")
SPRITES = {"sprites": 32, "sprites64": 64}
"""The data sets whose factors are known, and the size at which they are drawn."""
LEAST_JUDGED = 30
"""Images that distances and forests need."""


def _option(default: Any, help: str, unset: str = "") -> Any:
    """A field with its help text; `unset` describes the meaning of None."""
    return field(default=default, metadata={"help": help, "unset": unset})


@dataclass(frozen=True)
class LatentsConfig:
    """The complete configuration of one generator: it determines the weights bit for bit on one CPU.

    Every field is an option of `wellcond latents` under the same name.
    """

    data: str = _option("sprites", f"{listed(SPRITES)}, another data set as for train, or a folder of images")
    image_size: int | None = _option(None, "resize all images to this height and width", unset="as they are")
    limit: int | None = _option(None, "maximum number of images", unset="all")
    model: str = _option("eigengan", "eigengan: directions at every resolution; plain: one vector at the start")
    n_basis: int = _option(6, "directions for each resolution of eigengan")
    latents: int = _option(30, "latent variables of the plain generator")
    noise: int = _option(512, "further, undirected latent variables of eigengan")
    base_channels: int = _option(16, "channels at the full resolution; every halving of the image doubles them")
    max_channels: int = _option(512, "maximum number of channels")
    treat: str = _option(NO_TREATMENT, "none, or a combination of sn, ol, ow, nog, olr such as nog+olr")
    ol_weight: float = _option(100.0, "of ol: multiplies the mean square of the entries of UᵀU − I")
    steps: int = _option(100_000, "steps of both networks")
    batch_size: int = _option(64, "images per step")
    lr: float = _option(1e-4, "learning rate of both networks")
    r1: float = _option(10.0, "weight of the gradient penalty on real images")
    r1_every: int = _option(16, "steps between gradient penalties")
    average: float = _option(0.998, "decay of the averaged weights, which make all samples")
    record_every: int = _option(500, "steps between checkpoints, with metrics, condition numbers and samples")
    seed: int = _option(0, "random seed of weights, order and latents")
    threads: int | None = _option(None, "CPU threads", unset="PyTorch's default")

    def __post_init__(self) -> None:
        require_known(self.model, MODELS, "model", error=ConfigError)
        at_least_1 = ("n_basis", "latents", "noise", "base_channels", "max_channels", "steps", "batch_size", "r1_every")
        for name in (*at_least_1, "record_every", "image_size", "limit", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("ol_weight", "r1"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} must be a finite number >= 0, got {value}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be from 0 to below 1, got {self.average}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.has_factors and self.limit is not None and self.limit < LEAST_JUDGED:
            raise ConfigError(f"limit must be at least {LEAST_JUDGED}, to measure the generator, got {self.limit}")
        if self.has_factors and self.model == "plain" and self.latents < 2:
            raise ConfigError("measures of disentanglement need two latents or more, got 1")

    @property
    def devices(self) -> int:
        """Processes of a run, for the scheduling of many: always one."""
        return 1

    @property
    def label(self) -> str:
        """The short name of the configuration in tables: `eigengan`, `eigengan+nog+olr`."""
        return self.model if self.treat == NO_TREATMENT else f"{self.model}+{self.treat}"

    @property
    def folder_name(self) -> str:
        """Data, label and seed, as a folder name."""
        name = f"{Path(self.data).name}-{self.label}-seed{self.seed}"
        return re.sub("[^a-zA-Z0-9_.+]+", "-", name)

    @property
    def has_factors(self) -> bool:
        """Whether the factors of the images are known, as they were drawn, so that disentanglement can be measured."""
        return self.data in SPRITES and self.image_size in (None, SPRITES[self.data])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentsConfig:
        """The inverse of `to_dict`; unknown or missing fields raise `ConfigError`."""
        names = {option.name for option in fields(cls)}
        if set(values) != names:
            raise ConfigError(
                f"not the configuration of a generator: fields {sorted(names ^ set(values))} do not match"
            )
        return cls(**values)


def refuse_unused(asked: Iterable[str], config: LatentsConfig) -> None:
    """Reject options that were given but that this generator does not use.

    Raises:
        ConfigError: names the option and what it belongs to.
    """
    belongs_to = dict.fromkeys(("n_basis", "noise"), "eigengan") if config.model == "plain" else {"latents": "plain"}
    belongs_to = {name: f"model '{model}', and this is another" for name, model in belongs_to.items()}
    if "ol" not in config.treat.split("+"):
        belongs_to["ol_weight"] = "treatment 'ol', and there is none"
    for name in asked:
        if name in belongs_to:
            raise ConfigError(f"--{name.replace('_', '-')} is an option of {belongs_to[name]}; leave it out")


def latents_config(**options: Any) -> LatentsConfig:
    """The configuration for `options`; missing ones default to the settings of the data set, then the authors'.

    Raises:
        ValueError: an unknown option (with the nearest right one), or an invalid value.

    Example:
        >>> latents_config(data="faces", steps=5000).base_channels, latents_config().base_channels
        (16, 8)
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        require_known(
            name, [option.name for option in fields(LatentsConfig)], "option of a generator", error=ConfigError
        )
    if "treat" in given:
        given["treat"] = given["treat"].lower().replace(" ", "")
    settings = getattr(NAMED.get(given.get("data", "sprites")), "GENERATOR_SETTINGS", {})
    return LatentsConfig(**{**settings, **given})
