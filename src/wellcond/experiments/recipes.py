"""What is trained and how: the configuration of one run, each data set's defaults, the grid of a comparison.

The schedule is the paper's (Song, Sebe & Wang, ECCV 2022): SGD with momentum 0.9, weight decay 5e-4, batches
of 128, a learning rate of 0.1 divided by 10 after 150 and 250 of 350 epochs; for another number of epochs it
is scaled in proportion, to the step. Nothing here needs torch, so that `wellcond --help` is quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

NORMS = ("batch", "zca", "iter")
HEADS = ("avg", "gcp")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
NO_TREATMENT = "none"

DECAY_AFTER = (150 / 350, 250 / 350)
"""Fractions of the training after which the learning rate is divided by 10."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message holds the value and, for a name, the nearest one."""


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is known, else a `ConfigError` with the nearest name and all of them."""
    known = tuple(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"unknown {what} '{name}'{hint} (known: {', '.join(known)})")


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete: the same configuration gives the same weights, bit for bit, on one CPU.

    Attributes:
        data: name or path for `load_images`.
        limit: use this many images of each split at most; None for all.
        model, norm, head, width, stem_kernel, groups, eps: as `build_model` takes them.
        treat: treatments of the layer before the spectral layer, `nog+ow+olr`; `none`.
        epochs, batch_size, lr, momentum, weight_decay: of the schedule; the batch is that of one process.
        augment: random crops and flips of training images.
        seed: of the initial weights, the order of the images and the augmentation.
        precision: of Lightning's Trainer.
        devices: processes, on as many GPUs or CPU shares.
        threads: CPU threads of one process; None for torch's own choice.
        monitor_every: steps between two measurements of the condition number.
    """

    data: str = "digits"
    limit: int | None = None
    model: str = "resnet18"
    norm: str = "zca"
    head: str = "avg"
    width: int | None = None
    stem_kernel: int = 3
    groups: int = 1
    eps: float = 1e-5
    treat: str = NO_TREATMENT
    epochs: int = 350
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    seed: int = 0
    precision: str = "32-true"
    devices: int = 1
    threads: int | None = None
    monitor_every: int = 10

    def __post_init__(self) -> None:
        choose("norm", self.norm, NORMS)
        choose("head", self.head, HEADS)
        choose("precision", self.precision, PRECISIONS)
        for name in ("epochs", "batch_size", "devices", "monitor_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("limit", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.treat != NO_TREATMENT and self.norm == "batch" and self.head == "avg":
            raise ConfigError(
                f"treatment '{self.treat}' acts before a spectral layer, but norm 'batch' with head 'avg' "
                "has none: choose norm 'zca' or 'iter', or head 'gcp'"
            )

    @property
    def label(self) -> str:
        """The short name of the configuration in tables: `zca+nog+ow`, `batch/gcp`."""
        base = self.norm if self.head == "avg" else f"{self.norm}/{self.head}"
        return base if self.treat == NO_TREATMENT else f"{base}+{self.treat}"

    @property
    def folder_name(self) -> str:
        """The label and the seed, fit for a folder."""
        return f"{self.label.replace('/', '-')}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as `config.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; unknown or missing fields raise `ConfigError`."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not the configuration of a run: fields {sorted(names ^ set(values))} do not match")
        return cls(**values)


RECIPES: dict[str, dict[str, Any]] = {
    # 8 × 8 images: a small network. The 5 × 5 stem gives a covariance of rank up to 25, so 16 channels can
    # have full rank, where a 3 × 3 stem would stop at 9. A second thread gains a tenth on two idle cores, and on
    # busy ones, waiting in a loop at every small operation, makes a step 10 to 40 times longer.
    "digits": {
        "model": "resnet8",
        "width": 16,
        "stem_kernel": 5,
        "epochs": 5,
        "batch_size": 64,
        "augment": False,
        "threads": 1,
        "monitor_every": 5,
    },
}
"""Where a data set departs from the paper's recipe."""


def recipe(**options: Any) -> RunConfig:
    """The configuration for `options`; what is absent or None is from the data's recipe, then the paper's."""
    given = {name: value for name, value in options.items() if value is not None}
    if "treat" in given:
        given["treat"] = given["treat"].lower().replace(" ", "")
    return RunConfig(**{**RECIPES.get(given.get("data", "digits"), {}), **given})


def grid(
    norms: Sequence[str], heads: Sequence[str], treats: Sequence[str], seeds: Iterable[int], **options: Any
) -> list[RunConfig]:
    """Every combination once; batch norm with average pooling, where nothing can be treated, untreated."""
    seeds = list(seeds)
    spectral = {(norm, head): norm != "batch" or head == "gcp" for head in heads for norm in norms}
    rows = [
        (norm, head, treat)
        for (norm, head), treatable in spectral.items()
        for treat in (dict.fromkeys(treats) if treatable else (NO_TREATMENT,))
    ]
    return [
        recipe(norm=norm, head=head, treat=treat, seed=seed, **options) for norm, head, treat in rows for seed in seeds
    ]
