"""Inspecting the network of a run's checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from wellcond._shared.meaning import KEY, read
from wellcond.experiments import folders
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import CheckpointError, ConfigError, FolderError, RunError
from wellcond.experiments.inspect.found import Inspection
from wellcond.experiments.inspect.look import Look
from wellcond.experiments.run.checkpoints import newest_readable, read_checkpoint
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.run_folder import CHECKPOINTS, KIND
from wellcond.experiments.run.train import observed_layers
from wellcond.experiments.run.training import Classifier

log: logging.Logger = logging.getLogger("wellcond")


def newest_run(places: tuple[Path, ...]) -> Path | None:
    """The run with the newest checkpoint among the subfolders of ``places``; None if there is none."""
    found = [path for place in places for path in place.glob(f"*/{CHECKPOINTS}/*.ckpt")]
    found = [path for path in found if folders.kind_of(path.parents[1]) == KIND]
    return max(found, key=lambda path: path.stat().st_mtime).parents[1] if found else None


def inspect(
    place: str | os.PathLike[str],
    *,
    data: str | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    **look: Any,
) -> Inspection:
    """Measure the condition numbers of a run's newest checkpoint, or of a given checkpoint.

    The options are those of `wellcond inspect`; ``look`` are those of :class:`Look`.

    Raises:
        RunError: not a run, no readable checkpoint, or weights that do not fit the run's configuration.
        ValueError: an option invalid for :class:`Look`, an unknown layer, or images that do not fit the network.
        OSError: ``out`` or the picture cannot be written.
    """
    looking = Look(**look)
    run, path, checkpoint = _open(Path(place))
    config = RunConfig.from_dict(folders.read_config(run, KIND))
    image_size = config.image_size if image_size is None else image_size
    limit, areas = None if data else config.limit, config.crop == "resized"
    found = load_images(data or config.data, image_size=image_size, limit=limit, areas=areas)
    size = config.batch_size if batch_size is None else batch_size
    images = ImageDataModule(found, size, augment=False, seed=config.seed)
    module = _restored(config, checkpoint["state_dict"], path)
    if (wanted := module.model.get_submodule("conv1").in_channels) != found.in_channels:
        raise ConfigError(
            f"the network of '{run}' takes images of {wanted} channels, those of '{found.name}' have "
            f"{found.in_channels}; choose another --data"
        )
    epoch = int(checkpoint["epoch"]) + 1
    return looking.at(
        module,
        module.model,
        images,
        observed_layers(module),
        module.model,
        title=f"{config.model}, {config.label}, after {epoch} epochs",
        config=config,
        checkpoint=path,
        epoch=epoch,
    )


def _open(place: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The run's folder, the path of the checkpoint, and its contents."""
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
        # A skew-orthogonal convolution has a square kernel, and describes its channels in the state.
        meanings = [read(v) for k, v in state.items() if k.startswith("model.conv1.") and k.endswith(KEY)]
        in_channels, _ = next((m["channels"] for m in meanings if "channels" in m), (stem.shape[1], None))
        module = Classifier(config, num_classes=classes, in_channels=in_channels)
        module.load_state_dict(state)
    except (KeyError, StopIteration, RuntimeError, ValueError) as error:
        raise RunError(f"the weights in '{path}' are not those of the run beside it: {error}") from error
    return module
