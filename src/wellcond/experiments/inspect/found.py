"""What an inspection found, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wellcond.experiments.results.table import SPACE, Column, Table, number, rank, short
from wellcond.experiments.run.config import RunConfig
from wellcond.monitor import ConditionRecord

LONG_NAME = 16


class WeightSpectrum(NamedTuple):
    """The extreme singular values of a layer's weight as a matrix (out, in·kh·kw), all groups of it together."""

    layer: str
    rows: int
    columns: int
    largest: float
    smallest: float


class LayerSpectrum(NamedTuple):
    """The eigenvalues of a layer's covariance, falling, each the median over batches and matrices; and how many are
    more than rounding (the median too)."""

    eigvals: tuple[float, ...]
    numerical_rank: int


@dataclass(frozen=True)
class Inspection:
    """What was found of a network on so many `images` of a split of the data."""

    network: str  # what it is, for the title
    data: str
    split: str
    images: int
    records: tuple[ConditionRecord, ...]  # one for each layer and batch; the batch is the step
    layers: dict[str, dict[str, float]]  # medians over the batches, as `ConditionMonitor.statistics` has them
    weights: tuple[WeightSpectrum, ...]  # of the layers before the spectral layers
    unused: tuple[str, ...] = ()  # layers to be looked at which the network did not call
    spectra: Mapping[str, LayerSpectrum] = field(default_factory=dict)  # where a picture was asked for
    config: RunConfig | None = None  # of a run's network, with the two below
    checkpoint: Path | None = None
    epoch: int | None = None

    @property
    def title(self) -> str:
        """The network and the images."""
        return f"{self.network}; {self.images} {self.split} images of {self.data}"

    def table(self) -> Table:
        """A line for each observed layer."""
        rows = [
            [
                short(name),
                *(number(layer[key]) for key in ("kappa", "kappa_max", "kappa_eps")),
                rank(layer["numerical_rank"], int(layer["dim"])),
                *(number(layer[key]) for key in ("effective_rank", "eig_max", "eig_min")),
                f"{layer['failures']:g}",
            ]
            for name, layer in self.layers.items()
        ]
        batches = len({record.step for record in self.records})
        # With long names the ends of the spectrum have no room on a terminal.
        tight = max((len(short(name)) for name in self.layers), default=0) > LONG_NAME
        heads = ["κ(P)", "largest", "κ(P+εI)", "rank", "eff. rank", f"λ{SPACE}max", f"λ{SPACE}min", "fails"]
        columns = [Column(head, wide=tight and head in (heads[1], *heads[-3:-1])) for head in heads]
        return Table(
            ["layer", *columns],
            rows,
            caption=f"Medians over {batches} batches in training mode, of the covariance P of the layer's input.",
            title=self.title,
        )

    def lines(self) -> list[str]:
        """What there is to say below the table, a line each."""
        lines = [
            f"weight of {w.layer}, {w.rows} × {w.columns}: singular values from {w.smallest:.6g} to {w.largest:.6g}, "
            f"κ {number(w.largest / w.smallest if w.smallest else math.inf)}"
            for w in self.weights
        ]
        lines += [f"{short(name)} is not called by the network" for name in self.unused]
        return lines if self.checkpoint is None else [*lines, f"of {self.checkpoint}"]
