"""Training a generator from its configuration to its result.

    RUN/config.json  metrics.csv  result.json  traversal.png  samples/step-NNNNNN.png
    RUN/checkpoints/{last,previous}.ckpt

Every `record_every` steps a line of metrics, a picture of samples, and a checkpoint are written, the checkpoint last: a
run that is killed at any moment repeats what it had not saved, and goes on bit for bit. `result.json` marks the end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wellcond.experiments import folders
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.errors import CheckpointError
from wellcond.experiments.files import read_csv, write_csv
from wellcond.experiments.latents.conditioning import kappa_of_directions, kappa_of_jacobian
from wellcond.experiments.latents.config import SPRITES, LatentsConfig
from wellcond.experiments.latents.images import training_images
from wellcond.experiments.latents.judge import judge
from wellcond.experiments.latents.pictures import traversal, write_grid
from wellcond.experiments.latents.progress import ProgressBar
from wellcond.experiments.latents.result import LatentsResult, load_latents_result
from wellcond.experiments.latents.training import SHOWN, AdversarialTraining, Losses
from wellcond.experiments.run.checkpoints import DAMAGED, LAST, PREVIOUS, AtomicCheckpointIO, newest_readable
from wellcond.experiments.run.processes import threads
from wellcond.experiments.run.result import METRICS, RESULT, hardware, versions
from wellcond.experiments.run.run_folder import CHECKPOINTS

KIND = "generator"
SAMPLES, TRAVERSAL = "samples", "traversal.png"
MADE = (
    *(folders.CONFIG, METRICS, RESULT, TRAVERSAL, f"{SAMPLES}/step-*.png", ".*.part", f"{SAMPLES}/.*.part"),
    *(f"{CHECKPOINTS}/*.ckpt", f"{CHECKPOINTS}/*.ckpt{DAMAGED}", f"{CHECKPOINTS}/.*.part"),
)
COLUMNS = (
    *("step", "loss_discriminator", "loss_generator", "r1", "kappa_directions", "kappa_jacobian"),
    *("seconds", "seconds_total", "images_per_second"),
)
"""Columns of `metrics.csv`; the losses are those of the step, κ is of the averaged weights, as are all pictures and
measures. `seconds` is since the last record."""
PARTS = ("global_step", "r1", "generator", "discriminator", "average", "optimizers", "treatment", "seconds")
ROWS, PROBES = 8, 8
"""Samples in a row and column of a picture; latents at which the Jacobian is taken."""

log: logging.Logger = logging.getLogger("wellcond")


def train_generator(
    config: LatentsConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: ImageSet | None = None,
    progress: bool = False,
) -> LatentsResult:
    """Train the generator of `config` in `folder`, and measure it where the factors of the images are known.

    Args:
        resume: continue the run in `folder` after its last checkpoint. A finished run is only read back.
        overwrite: delete the run in `folder` (only its own files) and start over.
        data: the training images, if already loaded.
        progress: show a progress bar.

    Raises:
        RunError: the folder holds something else, another process uses it, no checkpoint can be read, the disk is full,
            or a loss is not finite. Existing files and checkpoints remain.
        ValueError: the data or an option is invalid; nothing was written.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    folder = Path(folder)
    check = partial(_check, folder, config, resume, overwrite)
    check()
    if resume and (finished := load_latents_result(folder)) is not None:
        return finished
    with folders.claimed(folder, check), threads(config.threads):
        images = training_images(config) if data is None else data
        if config.data in SPRITES and not config.has_factors:
            log.warning("resized sprites are not those that the observer knows: samples are made, and nothing measured")
        training = AdversarialTraining(config, images, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not resume:
            folders.prepare(folder, KIND, config.to_dict(), MADE)
        seconds = _restore(training, folder) if resume else 0.0
        with ProgressBar(config.steps, training.step_count) if progress else nullcontext() as shown:
            seconds = _fit(training, folder, seconds, shown)
        return _finish(training, folder, seconds)


def _check(folder: Path, config: LatentsConfig, resume: bool, overwrite: bool) -> None:
    held = folders.check(folder, KIND, resume=resume, overwrite=overwrite)
    if resume:
        folders.refuse_conflicts(held, config.to_dict(), folder)


def _restore(training: AdversarialTraining, folder: Path) -> float:
    """Load the last readable checkpoint, if there is one, and drop later metrics; the seconds trained so far."""
    if not any((folder / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS)):
        (folder / METRICS).unlink(missing_ok=True)
        return 0.0
    path, state, troubles = newest_readable(folder / CHECKPOINTS, PARTS)
    try:
        training.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"'{path}' is not of the run beside it ({str(error).splitlines()[0]}): start afresh with --overwrite"
        ) from error
    for damaged, trouble in troubles.items():
        damaged.replace(damaged.with_name(damaged.name + DAMAGED))
        log.warning("%s, and is set aside; going on from '%s', step %d", trouble, path.name, training.step_count)
    return state["seconds"]


def _fit(training: AdversarialTraining, folder: Path, seconds: float, shown: Callable[..., None] | None) -> float:
    """Train to the last step; the seconds of all sessions."""
    config, began, since = training.config, time.perf_counter() - seconds, training.step_count
    while training.step_count < config.steps:
        losses = training.step()
        done = training.step_count
        if shown is not None:
            shown(done, losses)
        if done % config.record_every == 0 or done == config.steps:
            now = time.perf_counter() - began
            _record(training, folder, losses, now - seconds, now, done - since)
            seconds, since = now, done
    return seconds


def _record(
    training: AdversarialTraining, folder: Path, losses: Losses, seconds: float, total: float, steps: int
) -> None:
    """A line of metrics, a picture and a checkpoint."""
    config, done = training.config, training.step_count
    z, noise = training.latents(ROWS**2, SHOWN)
    with torch.no_grad():
        write_grid(folder / SAMPLES / f"step-{done:06d}.png", training.average(z, noise), ROWS)
    line: dict[str, Any] = {
        "step": done,
        "loss_discriminator": losses.discriminator,
        "loss_generator": losses.generator,
        "r1": losses.r1,
        "kappa_directions": max(kappa_of_directions(training.average).values()),
        "kappa_jacobian": kappa_of_jacobian(training.average, z[:PROBES], noise[:PROBES]),
        "seconds": round(seconds, 3),
        "seconds_total": round(total, 3),
        "images_per_second": round(steps * config.batch_size / max(seconds, 1e-9), 1),
    }
    earlier = [row for row in read_csv(folder / METRICS) if int(row["step"]) < done]
    write_csv(folder / METRICS, COLUMNS, [*earlier, line])
    AtomicCheckpointIO().save_checkpoint({**training.state_dict(), "seconds": total}, folder / CHECKPOINTS / LAST)
    log.info(
        "step %d of %d: losses %.3f and %.3f, κ(U) %.4g, κ of the Jacobian %.4g, %.0f images/s",
        *(done, config.steps, losses.discriminator, losses.generator),
        *(line["kappa_directions"], line["kappa_jacobian"], line["images_per_second"]),
    )


def _finish(training: AdversarialTraining, folder: Path, seconds: float) -> LatentsResult:
    """The traversals, the measures and the result."""
    config = training.config
    generator = training.average.eval()
    z, noise = training.latents(1, SHOWN)
    columns = 7
    write_grid(folder / TRAVERSAL, traversal(generator, z, noise, columns), columns)
    last = read_csv(folder / METRICS)[-1]
    olr = training.treatment.olr if training.treatment is not None else None
    shortened = [counts["shortened"] / config.steps for counts in olr.counts().values()] if olr is not None else []
    result = LatentsResult(
        config=config,
        folder=str(folder),
        steps=training.step_count,
        seconds=seconds,
        seconds_per_step=seconds / training.step_count,
        kappa_directions=float(last["kappa_directions"]),
        kappa_jacobian=float(last["kappa_jacobian"]),
        shortened=sum(shortened) / len(shortened) if shortened else None,
        measures=judge(training) if config.has_factors else None,
        environment={**versions(), **hardware(), "device": str(training.device)},
    )
    result.save()
    return result
