"""The result of an inspection, as data and as a table."""

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
    """The extreme singular values of a layer's weight as a matrix (out, in·kh·kw), over all its groups."""

    layer: str
    rows: int
    columns: int
    largest: float
    smallest: float


class LayerSpectrum(NamedTuple):
    """The eigenvalues of a layer's covariance in descending order, and its numerical rank; medians over batches and
    matrices."""

    eigvals: tuple[float, ...]
    numerical_rank: int


@dataclass(frozen=True)
class Inspection:
    """The result for a network on `images` images of a split of the data."""

    network: str  # its description, for the title
    data: str
    split: str
    images: int
    records: tuple[ConditionRecord, ...]  # one per layer and batch; the step is the batch
    layers: dict[str, dict[str, float]]  # medians over batches, as in `ConditionMonitor.statistics`
    weights: tuple[WeightSpectrum, ...]  # of the layers before the spectral layers
    unused: tuple[str, ...] = ()  # requested layers that the network did not call
    spectra: Mapping[str, LayerSpectrum] = field(default_factory=dict)  # if a picture is requested
    config: RunConfig | None = None  # this and the following only for a run
    checkpoint: Path | None = None
    epoch: int | None = None

    @property
    def title(self) -> str:
        """A description of network and images."""
        return f"{self.network}; {self.images} {self.split} images of {self.data}"

    def table(self) -> Table:
        """One line per observed layer."""
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
        # Long names leave no room for the extreme eigenvalues on a terminal.
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
        """The lines below the table: weights, unused layers, and the checkpoint."""
        lines = [
            f"weight of {w.layer}, {w.rows} × {w.columns}: singular values from {w.smallest:.6g} to {w.largest:.6g}, "
            f"κ {number(w.largest / w.smallest if w.smallest else math.inf)}"
            for w in self.weights
        ]
        lines += [f"{short(name)} is not called by the network" for name in self.unused]
        return lines if self.checkpoint is None else [*lines, f"of {self.checkpoint}"]
