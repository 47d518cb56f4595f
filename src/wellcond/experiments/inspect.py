"""The conditioning of a trained network, layer by layer, on images of any data set: what `wellcond inspect` prints.

The covariances are those of batches in training mode, which the solver of a spectral layer sees in training; no step
is taken. With each comes the weight of the layer before it, whose singular values the treatments act on.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wellcond._shared.names import require_known
from wellcond.experiments import folders
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import CheckpointError, ConfigError, FolderError, RunError
from wellcond.experiments.results.table import SPACE, Table, number, rank, short
from wellcond.experiments.run.checkpoints import newest_readable, read_checkpoint
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.train import CHECKPOINTS, KIND, observed_layers
from wellcond.experiments.run.training import Classifier, spectral_layers
from wellcond.monitor import ConditionMonitor, ConditionRecord, as_writers
from wellcond.orthogonality import pre_spectral_layers, weight_matrices

log = logging.getLogger("wellcond")

LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


class WeightSpectrum(NamedTuple):
    """The extreme singular values of a layer's weight as a matrix (out, in·kh·kw), all groups of it together."""

    layer: str
    rows: int
    columns: int
    largest: float
    smallest: float


@dataclass(frozen=True)
class Inspection:
    """What was found of a run's checkpoint, after `epoch` epochs, on so many `images` of a split of the data."""

    config: RunConfig
    checkpoint: Path
    epoch: int
    data: str
    split: str
    images: int
    records: tuple[ConditionRecord, ...]  # one for each layer and batch; the batch is the step
    layers: dict[str, dict[str, float]]  # medians over the batches, as `ConditionMonitor.statistics` has them
    weights: tuple[WeightSpectrum, ...]  # of the layers before the spectral layers

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
        return Table(
            ["layer", "κ(P)", "largest", "κ(P+εI)", "rank", "eff. rank", f"λ{SPACE}max", f"λ{SPACE}min", "fails"],
            rows,
            caption=f"Medians over {batches} batches in training mode, of the covariance P of the layer's input.",
            title=f"{self.config.model}, {self.config.label}, after {self.epoch} epochs; {self.images} {self.split} "
            f"images of {self.data}",
        )

    def weight_lines(self) -> list[str]:
        """The singular values of the weights before the spectral layers, a line each."""
        return [
            f"weight of {w.layer}, {w.rows} × {w.columns}: singular values from {w.smallest:.6g} to {w.largest:.6g}, "
            f"κ {number(w.largest / w.smallest if w.smallest else math.inf)}"
            for w in self.weights
        ]


def newest_run(places: tuple[Path, ...]) -> Path | None:
    """The run with the newest checkpoint among the folders directly inside ``places``; None if there is none."""
    found = [path for place in places for path in place.glob(f"*/{CHECKPOINTS}/*.ckpt")]
    found = [path for path in found if folders.kind_of(path.parents[1]) == KIND]
    return max(found, key=lambda path: path.stat().st_mtime).parents[1] if found else None


def inspect(
    place: str | os.PathLike[str],
    *,
    data: str | None = None,
    image_size: int | None = None,
    split: str = "train",
    batches: int = 10,
    batch_size: int | None = None,
    out: Path | None = None,
) -> Inspection:
    """Measure the condition numbers of the network of a run's newest checkpoint, or of one of its checkpoints.

    The options are those of `wellcond inspect`.

    Raises:
        RunError: there is no run, no checkpoint that can be read, or its weights are not those of the run.
        ValueError: an unknown split, a number below 1, or images that the network does not take.
        OSError: ``out`` cannot be written.
    """
    require_known(split, LOADERS, "split", error=ConfigError)
    try:
        writers = as_writers(out)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if out is not None and out.exists():
        raise ConfigError(f"'{out}' is there already; choose another --out")
    if batches < 1:
        raise ConfigError(f"batches must be at least 1, got {batches}")
    run, path, checkpoint = _open(Path(place))
    config = RunConfig.from_dict(folders.read_config(run, KIND))
    image_size = config.image_size if image_size is None else image_size
    areas = config.crop == "resized"
    limit = None if data else config.limit
    found = load_images(data or config.data, image_size=image_size, limit=limit, areas=areas)
    size = config.batch_size if batch_size is None else batch_size
    images = ImageDataModule(found, size, augment=False, seed=config.seed)
    module = _restored(config, checkpoint["state_dict"], path)
    if (wanted := module.model.get_submodule("conv1").in_channels) != found.in_channels:
        raise ConfigError(
            f"the network of '{run}' takes images of {wanted} channels, those of '{found.name}' have "
            f"{found.in_channels}; choose another --data"
        )
    module.train()
    loader = getattr(images, LOADERS[split])
    seen = 0
    with ConditionMonitor(module, every=1, layers=observed_layers(module)) as monitor, torch.no_grad():
        for _, batch in zip(range(batches), loader(), strict=False):
            inputs: Tensor = images.on_after_batch_transfer(batch, 0)[0]
            module.model(inputs)
            monitor.step += 1  # the model is a part of the module that is watched
            seen += len(inputs)
    if out is not None:  # not by the monitor, which only warns of a file that it cannot write
        (writer,) = writers
        for record in monitor.records:
            writer(record)
    return Inspection(
        config=config,
        checkpoint=path,
        epoch=int(checkpoint["epoch"]) + 1,
        data=found.name,
        split=split,
        images=seen,
        records=tuple(monitor.records),
        layers=monitor.statistics(),
        weights=tuple(_weights(module.model)),
    )


def _open(place: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The run's folder, the checkpoint and what is in it."""
    run = place if place.is_dir() else place.parent.parent
    if not place.exists() or folders.kind_of(run) != KIND:
        raise FolderError(f"'{place}' is not a run; give the folder of one, or one of its checkpoints")
    if place.is_dir():
        path, checkpoint, troubles = newest_readable(run / CHECKPOINTS)
        if troubles:
            log.warning("%s; looking at '%s'", "; ".join(troubles.values()), path.name)
        return run, path, checkpoint
    try:
        return run, place, read_checkpoint(place, parts=("state_dict", "epoch"))
    except ValueError as error:
        raise CheckpointError(f"'{place}' is not a checkpoint of a run ({error})") from error


def _restored(config: RunConfig, state: dict[str, Tensor], path: Path) -> Classifier:
    try:
        classes = len(state["model.classifier.bias"])
        stem = next(v for k, v in state.items() if k.startswith("model.conv1.") and v.ndim == 4)
        module = Classifier(config, num_classes=classes, in_channels=stem.shape[1])
        module.load_state_dict(state)
    except (KeyError, StopIteration, RuntimeError) as error:
        raise RunError(f"the weights in '{path}' are not those of the run beside it: {error}") from error
    return module


def _weights(model: nn.Module) -> Iterator[WeightSpectrum]:
    for name, layer in pre_spectral_layers(model).items() if spectral_layers(model) else ():
        matrix = weight_matrices(layer).detach().double()  # of the weight in use
        values = torch.linalg.svdvals(matrix)
        rows, columns = matrix.shape[-2:]
        yield WeightSpectrum(name, rows, columns, values.max().item(), values.min().item())
