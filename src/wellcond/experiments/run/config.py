"""The configuration of a run.

The defaults are those of the paper (Song, Sebe & Wang, ECCV 2022) and its released code: SGD with momentum 0.9, weight
decay 5e-4, batch size 128, and a learning rate of 0.1 divided by 10 after 100, 200 and 300 of 350 epochs, scaled in
proportion for other numbers of epochs. Data sets may override the defaults. This module must not import torch, so that
`wellcond --help` is fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from wellcond._shared.names import listed, require_known
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.parts import HEADS, NORMS, is_treatable, takes_solver
from wellcond.experiments.run.schedule import Schedule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ALSO_CALLED = {
    **dict.fromkeys(("32", "fp32", "float32"), "32-true"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16-mixed"),
    **dict.fromkeys(("16", "fp16", "float16", "half"), "16-mixed"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": PRECISIONS,
    "running": ("covariance", "whitening"),
    "ow_map": ("exp", "cayley", "householder", "soc"),
    "norm_weight": ("ones", "uniform"),
    "stem": ("cifar", "imagenet"),
    "crop": ("border", "resized"),
    "memory_format": ("channels_last", "contiguous"),
}
"""The options with a fixed set of values."""

NO_TREATMENT = "none"

BEFORE: dict[str, Any] = {
    "image_size": None,
    "solver": None,
    "running": "covariance",
    "ow_map": "exp",
    "norm_weight": "ones",
    "stem": "cifar",
    "crop": "border",
    "schedule": "150,250/350",
    "memory_format": "contiguous",
    "compile": False,
    "workers": 0,
}
"""The behaviour of earlier versions, for options that did not exist then."""


def _option(default: Any, help: str, unset: str = "") -> Any:
    """A field with its help text; `unset` describes the meaning of None."""
    return field(default=default, metadata={"help": help, "unset": unset})


@dataclass(frozen=True)
class RunConfig:
    """The complete configuration of one run: it determines the weights bit for bit on one CPU.

    Every field is an option of `wellcond train` and `wellcond compare` under the same name.
    """

    data: str = _option("digits", f"{listed(NAMED)}; another NAME on the Hugging Face hub; or a path")
    image_size: int | None = _option(None, "resize all images to this height and width", unset="as they are")
    limit: int | None = _option(None, "maximum number of images per split", unset="all")
    model: str = _option("resnet18", "resnet8, resnet18, resnet50, …")
    norm: str = _option("zca", f"of the stem: {listed(NORMS)}")
    head: str = _option("avg", listed(HEADS))
    width: int | None = _option(None, "channels after the stem", unset="the model's default")
    stem: str = _option("cifar", "cifar: no downsampling; imagenet: 7×7, stride 2, and max-pooling")
    stem_kernel: int = _option(3, "kernel size of the cifar stem")
    groups: int = _option(1, "groups of the decorrelated batch norm")
    eps: float = _option(1e-5, "ε added to the covariance of the decorrelated norm")
    solver: str | None = _option(
        None, "of the spectral layers: eigh, svd, svd:taylor, newton_schulz, …", unset="the layer's default"
    )
    running: str = _option("covariance", f"running statistic of the norm: {listed(CHOICES['running'])}")
    norm_weight: str = _option("ones", "initial weight of the decorrelated norm: ones, or uniform on [0, 1)")
    treat: str = _option(NO_TREATMENT, "none, or a combination of sn, ol, ow, nog, olr such as nog+ow+olr")
    ow_map: str = _option("exp", f"parametrisation of ow: {listed(CHOICES['ow_map'])}")
    epochs: int = _option(350, "passes over the training images; the schedule scales with them")
    batch_size: int = _option(128, "images per step and process")
    lr: float = _option(0.1, "initial learning rate")
    momentum: float = _option(0.9, "of SGD")
    weight_decay: float = _option(5e-4, "of SGD")
    schedule: str = _option(
        "100,200,300/350", "epochs/total after which the rate is divided by 10; or cosine, constant"
    )
    augment: bool = _option(True, "random crops and flips")
    crop: str = _option("border", "border: shift within a border of 1/8; resized: random area and aspect ratio")
    seed: int = _option(0, "random seed of weights, order and augmentation")
    precision: str = _option("32-true", listed(PRECISIONS))
    memory_format: str = _option("channels_last", listed(CHOICES["memory_format"]))
    compile: bool = _option(False, "use torch.compile")
    workers: int = _option(0, "worker processes that read and decode images")
    devices: int = _option(1, "training processes, one per GPU or CPU share")
    threads: int | None = _option(None, "CPU threads per process", unset="PyTorch's default")
    monitor_every: int = _option(10, "steps between records of condition numbers")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            also = ALSO_CALLED if name == "precision" else {}
            require_known(getattr(self, name), choices, name, error=ConfigError, also_called=also)
        Schedule.parse(self.schedule)
        treatable = is_treatable(self.norm, self.head)
        for name in ("epochs", "batch_size", "devices", "monitor_every", "limit", "threads", "image_size", "width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        for name in ("seed", "workers"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        if self.crop == "resized" and self.image_size is None:
            raise ConfigError("crop 'resized' needs image_size, such as 224")
        if self.solver is not None and not takes_solver(self.norm, self.head):
            raise ConfigError(
                f"solver '{self.solver}' needs a spectral layer that takes one: norm '{self.norm}' and head "
                f"'{self.head}' do not"
            )
        if self.treat != NO_TREATMENT and not treatable:
            norms = " or ".join(f"'{name}'" for name, part in NORMS.items() if part.spectral)
            heads = " or ".join(f"'{name}'" for name, part in HEADS.items() if part.spectral)
            raise ConfigError(
                f"treatment '{self.treat}' acts before a spectral layer, but norm '{self.norm}' with head "
                f"'{self.head}' has none: choose norm {norms}, or head {heads}"
            )

    @property
    def label(self) -> str:
        """The short name of the configuration in tables: `zca+nog+ow`, `batch/gcp`."""
        base = self.norm if self.head == "avg" else f"{self.norm}/{self.head}"
        if self.solver is not None:
            base += f" by {self.solver}"
        if self.treat == NO_TREATMENT:
            return base
        ow = "ow" if self.ow_map == "exp" else f"ow({self.ow_map})"
        return "+".join([base, *(ow if name == "ow" else name for name in self.treat.split("+"))])

    @property
    def folder_name(self) -> str:
        """The label and the seed, as a folder name."""
        return f"{re.sub('[^a-zA-Z0-9_.+]+', '-', self.label)}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; unknown or missing fields raise `ConfigError`.

        Options that did not exist in earlier versions may be missing and are taken from `BEFORE`.
        """
        values = {**BEFORE, **values}
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not the configuration of a run: fields {sorted(names ^ set(values))} do not match")
        return cls(**values)


LEAST_WIDTH = 8
"""Channels from which on channels-last convolutions are safe.

On CPUs without AVX-512, PyTorch 2.13 writes out of bounds in the backward pass of a channels-last 1 × 1 convolution of
stride 2 with fewer than 8 input channels (seen with 2, 4, 5 and 6; none from 8 on): "double free or corruption".
"""


def refuse_unsafe(config: RunConfig) -> None:
    """Refuse to train what corrupts memory, see ``LEAST_WIDTH``; results of such runs can still be read.

    Raises:
        ConfigError: a channels-last or compiled network that is too narrow.
    """
    channels_last = config.memory_format == "channels_last"
    if (config.width or LEAST_WIDTH) < LEAST_WIDTH and (channels_last or config.compile):  # the compiler chooses it too
        cause = "memory_format 'channels_last'" if channels_last else "compile"
        raise ConfigError(
            f"width {config.width} with {cause} corrupts memory on some CPUs, by a fault of PyTorch in its narrow "
            f"1 × 1 convolutions: train it afresh without that, or with a width of at least {LEAST_WIDTH}"
        )


def run_config(**options: Any) -> RunConfig:
    """The configuration for `options`; missing ones default to the settings of the data set, then the paper's."""
    given = {name: value for name, value in options.items() if value is not None}
    if "treat" in given:
        given["treat"] = given["treat"].lower().replace(" ", "")
    settings = dict(getattr(NAMED.get(given.get("data", "digits")), "SETTINGS", {}))
    if given.get("stem") == "imagenet":  # it has a fixed kernel size
        settings.pop("stem_kernel", None)
    options = {**settings, **given}
    if 0 < (options.get("width") or LEAST_WIDTH) < LEAST_WIDTH:
        options.setdefault("memory_format", "contiguous")
    return RunConfig(**options)
