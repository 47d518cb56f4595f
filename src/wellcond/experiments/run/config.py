"""What is trained and how: the configuration of one run, and the grid of a comparison.

The defaults are the paper's (Song, Sebe & Wang, ECCV 2022): SGD with momentum 0.9, weight decay 5e-4, batches of 128,
a learning rate of 0.1 divided by 10 after 150 and 250 of 350 epochs; for another number of epochs it is scaled in
proportion, to the step. Data sets depart from them by recipes of their own. Nothing here needs torch, so that
`wellcond --help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from wellcond._shared.names import listed, require_known
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.parts import HEADS, NORMS, is_treatable

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ALSO_CALLED = {
    **dict.fromkeys(("32", "fp32", "float32"), "32-true"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16-mixed"),
    **dict.fromkeys(("16", "fp16", "float16", "half"), "16-mixed"),
}
NO_TREATMENT = "none"

DECAY_AFTER = (150 / 350, 250 / 350)
"""Fractions of the training after which the learning rate is divided by 10."""


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
    stem_kernel: int = _option(3, "size of the first convolution")
    groups: int = _option(1, "groups of the decorrelated batch norm")
    eps: float = _option(1e-5, "ε added to the covariance")
    treat: str = _option(NO_TREATMENT, "none, or of sn, ol, ow, nog, olr, as nog+ow+olr")
    epochs: int = _option(350, "passes over the training images; the schedule scales with them")
    batch_size: int = _option(128, "images a step (of each process)")
    lr: float = _option(0.1, "learning rate at the start")
    momentum: float = _option(0.9, "of SGD")
    weight_decay: float = _option(5e-4, "of SGD")
    augment: bool = _option(True, "random crops and flips")
    seed: int = _option(0, "of weights, order and augmentation")
    precision: str = _option("32-true", listed(PRECISIONS))
    devices: int = _option(1, "processes, on as many GPUs or CPU shares")
    threads: int | None = _option(None, "CPU threads of a process", unset="PyTorch's own")
    monitor_every: int = _option(10, "steps between condition numbers")

    def __post_init__(self) -> None:
        require_known(self.precision, PRECISIONS, "precision", error=ConfigError, also_called=ALSO_CALLED)
        treatable = is_treatable(self.norm, self.head)
        for name in ("epochs", "batch_size", "devices", "monitor_every", "limit", "threads", "image_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
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
        return base if self.treat == NO_TREATMENT else f"{base}+{self.treat}"

    @property
    def folder_name(self) -> str:
        """The label and the seed, fit for a folder."""
        return f"{self.label.replace('/', '-')}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; unknown or missing fields raise `ConfigError`.

        `image_size` may be missing: earlier versions had none.
        """
        values = {"image_size": None, **values}
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not the configuration of a run: fields {sorted(names ^ set(values))} do not match")
        return cls(**values)


def recipe(**options: Any) -> RunConfig:
    """The configuration for `options`; what is absent or None is from the data's recipe, then the paper's."""
    given = {name: value for name, value in options.items() if value is not None}
    if "treat" in given:
        given["treat"] = given["treat"].lower().replace(" ", "")
    return RunConfig(**{**getattr(NAMED.get(given.get("data", "digits")), "RECIPE", {}), **given})


def said_default(option: Field[Any]) -> str:
    """What the command line says of the default of a field: the paper's, and the digits' own."""
    values = dict.fromkeys((option.default, getattr(recipe(), option.name)))
    texts = [option.metadata["unset"] if value is None else str(value) for value in values]
    if option.type == "bool":
        texts = [f"{'' if value else 'no-'}{option.name}" for value in values]
    return "; digits: ".join(texts)


def grid(
    norms: Sequence[str], heads: Sequence[str], treats: Sequence[str], seeds: Iterable[int], **options: Any
) -> list[RunConfig]:
    """Every combination once; where there is no spectral layer, so that nothing can be treated, untreated.

    Raises:
        ConfigError: as `RunConfig`; and there is a treatment, but no spectral layer anywhere.
    """
    nowhere = not any(is_treatable(norm, head) for norm in norms for head in heads)
    rows = dict.fromkeys(
        (norm, head, treat if nowhere or is_treatable(norm, head) else NO_TREATMENT)
        for head in heads
        for norm in norms
        for treat in treats
    )
    seeds = list(seeds)
    return [
        recipe(norm=norm, head=head, treat=treat, seed=seed, **options) for norm, head, treat in rows for seed in seeds
    ]
