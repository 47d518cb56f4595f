"""The choice of layers, and forward passes of batches in training mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.names import choices, require_known
from wellcond._shared.torch_internals import uncompiled
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.inspect.found import Inspection, WeightSpectrum
from wellcond.experiments.inspect.spectra import Spectra
from wellcond.experiments.results.table import short
from wellcond.experiments.run.training import spectral_layers
from wellcond.monitor import ConditionMonitor, as_writers
from wellcond.orthogonality import pre_spectral_layers, weight_matrices

log: logging.Logger = logging.getLogger("wellcond")

LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.RMSNorm),
)
SUFFIXES = ("", ".png", ".svg")


@dataclass(frozen=True)
class Look:
    """Options of an inspection: split, maximum number of batches, layer patterns (shell-style), and output files for
    the numbers of every batch and for the picture.

    Raises:
        ConfigError: an unknown split, fewer than one batch, an unknown file format, an existing file, or a missing
            folder for the picture.
    """

    split: str = "train"
    batches: int = 10
    layers: Sequence[str] = ()
    out: Path | None = None
    picture: Path | None = None

    def __post_init__(self) -> None:
        require_known(self.split, LOADERS, "split", error=ConfigError)
        if self.batches < 1:
            raise ConfigError(f"batches must be at least 1, got {self.batches}")
        try:
            as_writers(self.out)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.out is not None and self.out.exists():
            raise ConfigError(f"'{self.out}' is there already; choose another --out")
        if self.picture is None:
            return
        if self.picture.suffix not in SUFFIXES or not self.picture.name:
            raise ConfigError(f"the picture is PNG and SVG, got '{self.picture}'; give a name without a suffix")
        if not self.picture.parent.is_dir():
            raise ConfigError(f"there is no folder '{self.picture.parent}' for the picture")
        for suffix in SUFFIXES[1:]:
            if (path := self.picture.with_suffix(suffix)).exists():
                raise ConfigError(f"'{path}' is there already; choose another --picture")

    def at(
        self,
        root: nn.Module,
        network: nn.Module,
        images: ImageDataModule,
        observed: Iterable[str],
        forward: Callable[[Tensor], object],
        title: str,
        **about: Any,
    ) -> Inspection:
        """Run the batches through `forward`, which calls `network`, in training mode, and write the output files.

        Layer names are those in `root`, which contains `network`. `observed` are the layers without a pattern; `about`
        has the remaining fields of the `Inspection`.
        """
        names = matching(root, self.layers) if self.layers else list(observed)
        if not names:
            raise ConfigError(f"{title} has no spectral layer and no norm to look at; choose --layers")
        root.train()
        loader, seen = getattr(images, LOADERS[self.split]), 0
        look = Spectra(root, names if self.picture is not None else ())
        monitor = ConditionMonitor(root, every=1, layers=names)
        with uncompiled(), monitor, look as spectra, torch.no_grad():
            for index, batch in zip(range(self.batches), loader(), strict=False):
                inputs: Tensor = images.on_after_batch_transfer(batch, 0)[0]
                monitor.step = spectra.batch = index
                forward(inputs)
                seen += len(inputs)
        if self.out is not None:  # the monitor's writers would only warn about errors
            (writer,) = as_writers(self.out)
            for record in monitor.records:
                writer(record)
        found = Inspection(
            network=title,
            data=images.data.name,
            split=self.split,
            images=seen,
            records=tuple(monitor.records),
            layers=monitor.statistics(),
            weights=tuple(_weights(network)),
            unused=tuple(name for name in names if not monitor.of(name)),
            spectra=spectra.found(),
            **about,
        )
        if self.picture is not None:
            from wellcond.experiments.show.figures import save_figure
            from wellcond.experiments.show.spectra import spectra_figure

            figure = spectra_figure({short(name): s for name, s in found.spectra.items()}, found.title)
            save_figure(figure, self.picture.with_suffix(""))
        return found


def matching(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the layers that match any of the patterns, in network order."""
    names = [name for name, _ in root.named_modules() if name]

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(short(name), pattern)

    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ConfigError(f"no layer is called '{pattern}'{choices(pattern, map(short, names))}")
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def spectral_or_norms(model: nn.Module) -> list[str]:
    """The spectral layers or, if there are none, all norms."""
    norms = [name for name, module in model.named_modules() if name and isinstance(module, NORMS)]
    return list(spectral_layers(model)) or norms


def _weights(network: nn.Module) -> Iterator[WeightSpectrum]:
    try:
        before = pre_spectral_layers(network) if spectral_layers(network) else {}
    except ValueError as error:  # the network cannot be traced
        log.info("weights before the spectral layers are not shown: %s", str(error).splitlines()[0])
        return
    for name, layer in before.items():
        matrix = weight_matrices(layer).detach().double()  # with parametrisations applied
        values = torch.linalg.svdvals(matrix)
        rows, columns = matrix.shape[-2:]
        yield WeightSpectrum(name, rows, columns, values.max().item(), values.min().item())
