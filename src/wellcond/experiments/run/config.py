"""What is trained and how: the configuration of one run, and the grid of a comparison.

The defaults are those of the paper (Song, Sebe & Wang, ECCV 2022) and of its released code: SGD with momentum 0.9,
weight decay 5e-4, batches of 128, a learning rate of 0.1 divided by 10 after 100, 200 and 300 of 350 epochs; for
another number of epochs it is scaled in proportion, to the step. Data sets depart from them by settings of their own.
Nothing here needs torch, so that `wellcond --help` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
CHOICES = {
    "precision": PRECISIONS,
    "running": ("covariance", "whitening"),
    "ow_map": ("exp", "cayley", "householder", "soc"),
    "norm_weight": ("ones", "uniform"),
    "stem": ("cifar", "imagenet"),
    "crop": ("border", "resized"),
    "memory_format": ("channels_last", "contiguous"),
}
"""Of options that are one of few words."""

NO_TREATMENT = "none"

BEFORE = {
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
"""What runs had before there were these options."""


def _option(default: Any, help: str, unset: str = "") -> Any:
    """A field with what the command line says of it; `unset` is what it does where it is None."""
    return field(default=default, metadata={"help": help, "unset": unset})


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete: the same configuration gives the same weights, bit for bit, on one CPU.

    Every field is an option of `wellcond train` and `wellcond compare` under the same name.
    """

    data: str = _option("digits", f"{listed(NAMED)}; another NAME on the Hugging Face hub; or a path")
    image_size: int | None = _option(None, "bring all images to this height and width", unset="as they are")
    limit: int | None = _option(None, "use this many images of each split at most", unset="all")
    model: str = _option("resnet18", "resnet8, resnet18, resnet50, …")
    norm: str = _option("zca", f"of the stem: {listed(NORMS)}")
    head: str = _option("avg", listed(HEADS))
    width: int | None = _option(None, "channels after the stem", unset="the model's own")
    stem: str = _option("cifar", "cifar: at the size of the image; imagenet: 7×7, stride 2, and max-pooling")
    stem_kernel: int = _option(3, "size of the first convolution of the cifar stem")
    groups: int = _option(1, "groups of the decorrelated batch norm")
    eps: float = _option(1e-5, "ε added to the covariance of the decorrelated norm")
    solver: str | None = _option(
        None, "of the spectral layers: eigh, svd, svd:taylor, newton_schulz, …", unset="the layer's own"
    )
    running: str = _option("covariance", f"what the norm averages for evaluation: {listed(CHOICES['running'])}")
    norm_weight: str = _option("ones", "start of the decorrelated norm's weight: ones, or uniform on [0, 1)")
    treat: str = _option(NO_TREATMENT, "none, or of sn, ol, ow, nog, olr, as nog+ow+olr")
    ow_map: str = _option("exp", f"of ow: {listed(CHOICES['ow_map'])}")
    epochs: int = _option(350, "passes over the training images; the schedule scales with them")
    batch_size: int = _option(128, "images a step (of each process)")
    lr: float = _option(0.1, "learning rate at the start")
    momentum: float = _option(0.9, "of SGD")
    weight_decay: float = _option(5e-4, "of SGD")
    schedule: str = _option(
        "100,200,300/350", "epochs after which the rate is divided by 10, of how many; or cosine, constant"
    )
    augment: bool = _option(True, "random crops and flips")
    crop: str = _option("border", "border: of an eighth around the image; resized: random area and shape")
    seed: int = _option(0, "of weights, order and augmentation")
    precision: str = _option("32-true", listed(PRECISIONS))
    memory_format: str = _option("channels_last", listed(CHOICES["memory_format"]))
    compile: bool = _option(False, "by torch.compile")
    workers: int = _option(0, "processes that read and decode images")
    devices: int = _option(1, "processes, on as many GPUs or CPU shares")
    threads: int | None = _option(None, "CPU threads of a process", unset="PyTorch's own")
    monitor_every: int = _option(10, "steps between condition numbers")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            also = ALSO_CALLED if name == "precision" else {}
            require_known(getattr(self, name), choices, name, error=ConfigError, also_called=also)
        Schedule.parse(self.schedule)
        treatable = is_treatable(self.norm, self.head)
        for name in ("epochs", "batch_size", "devices", "monitor_every", "limit", "threads", "image_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        for name in ("seed", "workers"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        if self.crop == "resized" and self.image_size is None:
            raise ConfigError("crop 'resized' brings areas of the images to one size: give image_size, such as 224")
        if self.solver is not None and not takes_solver(self.norm, self.head):
            raise ConfigError(
                f"solver '{self.solver}' is that of a spectral layer, but of norm '{self.norm}' and head '{self.head}' "
                "none takes one"
            )
        if self.treat != NO_TREATMENT and not treatable:
            norms, heads = (
                " or ".join(f"'{name}'" for name, part in parts.items() if part.spectral) for parts in (NORMS, HEADS)
            )
            raise ConfigError(
                f"treatment '{self.treat}' acts before a spectral layer, but norm '{self.norm}' with head "
                f"'{self.head}' has none: choose norm {norms}, or head {heads}"
            )

    @property
    def label(self) -> str:
        """The short name of the configuration in tables: `zca+nog+ow`, `batch/gcp`."""
        base = self.norm if self.head == "avg" else f"{self.norm}/{self.head}"
        base = base if self.solver is None else f"{base} by {self.solver}"
        treat = (
            self.treat if self.ow_map == "exp" else f"+{self.treat}+".replace("+ow+", f"+ow({self.ow_map})+").strip("+")
        )
        return base if self.treat == NO_TREATMENT else f"{base}+{treat}"

    @property
    def folder_name(self) -> str:
        """The label and the seed, fit for a folder."""
        return f"{re.sub('[^a-zA-Z0-9_.+]+', '-', self.label)}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; unknown or missing fields raise `ConfigError`.

        Options that earlier versions did not have may be missing: `BEFORE` has what was done then.
        """
        values = {**BEFORE, **values}
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not the configuration of a run: fields {sorted(names ^ set(values))} do not match")
        return cls(**values)


def run_config(**options: Any) -> RunConfig:
    """The configuration for `options`; what is absent or None is from the settings of the data, then the paper's."""
    given = {name: value for name, value in options.items() if value is not None}
    if "treat" in given:
        given["treat"] = given["treat"].lower().replace(" ", "")
    settings = dict(getattr(NAMED.get(given.get("data", "digits")), "SETTINGS", {}))
    if given.get("stem") == "imagenet":  # which has a convolution of its own
        settings.pop("stem_kernel", None)
    return RunConfig(**{**settings, **given})


def refuse_what_nothing_takes(asked: Iterable[str], configs: Sequence[RunConfig]) -> None:
    """Refuse options that were asked for and that none of the runs has anything for.

    Raises:
        ConfigError: names the option, and what it is of.
    """
    taken = {
        **dict.fromkeys(("eps", "groups", "running", "norm_weight"), "norms 'zca' and 'iter', and the norm is another"),
        "ow_map": "treatment 'ow', and there is none",
    }
    spectral = any(NORMS[config.norm].spectral for config in configs)
    orthogonal = any("ow" in config.treat.split("+") for config in configs)
    for name in asked:
        if name in taken and not (orthogonal if name == "ow_map" else spectral):
            raise ConfigError(f"--{name.replace('_', '-')} is an option of {taken[name]}; leave it out")


def grid(
    norms: Sequence[str], heads: Sequence[str], treats: Sequence[str], seeds: Iterable[int], **options: Any
) -> list[RunConfig]:
    """Every combination once; where there is no spectral layer, untreated, and without a solver where none is taken.

    Raises:
        ConfigError: as `RunConfig`; and there is a treatment or a solver, but nothing anywhere that takes it.
    """
    nowhere = not any(is_treatable(norm, head) for norm in norms for head in heads)
    rows = dict.fromkeys(
        (norm, head, treat if nowhere or is_treatable(norm, head) else NO_TREATMENT)
        for head in heads
        for norm in norms
        for treat in treats
    )
    solver = options.pop("solver", None)
    no_solver = not any(takes_solver(norm, head) for norm, head, _ in rows)
    seeds, configs = list(seeds), []
    for norm, head, treat in rows:
        its: dict[str, Any] = {"norm": norm, "head": head, "treat": treat}
        its["solver"] = solver if no_solver or takes_solver(norm, head) else None
        configs += [run_config(**its, seed=seed, **options) for seed in seeds]
    return configs
