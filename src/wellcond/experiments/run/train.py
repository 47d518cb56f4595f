"""Training a run from its configuration to its result, in one process or several."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import nn

from wellcond._shared.names import listed
from wellcond.experiments import folders
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.errors import ConfigError, NonFiniteLossError, RunError, needs_train_extra
from wellcond.experiments.run.build import batches, build
from wellcond.experiments.run.checkpoints import AtomicCheckpointIO, BestAndLast
from wellcond.experiments.run.compiled import compile_stages
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.divergence import LAST_CONDITION, keep_last
from wellcond.experiments.run.interruptions import Interruptions
from wellcond.experiments.run.log import ProgressBar, RunLog
from wellcond.experiments.run.processes import group_ends_first, quiet, spawn, threads
from wellcond.experiments.run.result import CONDITION, LayerCondition, RunResult, hardware, load_result, versions
from wellcond.experiments.run.run_folder import BEGINNING, CHECKPOINTS, KIND, MADE, Start, check, extend, starting_point
from wellcond.experiments.run.training import Classifier, evaluate, spectral_layers
from wellcond.lightning import ConditionMonitorCallback

with needs_train_extra():
    import lightning
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

log: logging.Logger = logging.getLogger("wellcond")

ENOUGH_STEPS = 100
"""To say that a treatment which did nothing so far does nothing."""


def run(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: ImageData | None = None,
    progress: bool = False,
) -> RunResult:
    """Train and test `config` in `folder`.

    Args:
        resume: continue the run in `folder` after its last finished epoch. A finished run is only read back or, if
            `config` has more epochs, extended with the learning rates of the longer schedule.
        overwrite: delete the run in `folder` (only its own files) and start over.
        data: the images, if already loaded.
        progress: show a progress bar.

    Raises:
        RunError: the folder holds something else, another process uses it, no checkpoint can be read, the disk is full,
            or the loss is not finite. Existing files and the checkpoints of finished epochs remain.
        ValueError: the data, the model or the treatment of `config` is invalid; nothing was written.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    folder = Path(folder)
    torchrun = "RANK" in os.environ
    if torchrun and config.devices != int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"devices is {config.devices}, but torchrun started {os.environ['WORLD_SIZE']} processes")
    leader = not torchrun or os.environ["RANK"] == "0"  # only rank 0 manages the folder
    check_folder = partial(check, folder, config, resume, overwrite)
    if leader:
        check_folder()
    finished = load_result(folder) if resume else None
    if finished is not None and finished.config.epochs == config.epochs:
        return finished
    with folders.claimed(folder, check_folder) if leader else nullcontext(), threads(config.threads):
        module, images = build(config, data)
        if leader and not resume:
            folders.prepare(folder, KIND, config.to_dict(), MADE)
        start = starting_point(folder, module, leader) if resume else BEGINNING
        if leader and resume:
            extend(folder, config)
        if config.devices == 1 or torchrun:
            return _train(config, folder, start, module, images, progress)
        spawn(_process, config.devices, config, folder, start, progress)
    result = load_result(folder)
    if result is None:
        raise RunError(f"the processes of '{folder}' ended without a result; go on with --resume")
    return result


def _process(config: RunConfig, folder: Path, start: Start, progress: bool) -> None:
    """Train in one of several processes. The parent has already logged messages about the data."""
    logging.getLogger("wellcond.experiments.data").setLevel(logging.ERROR)
    with threads(config.threads):
        _train(config, folder, start, *build(config, None), progress)


def observed_layers(model: nn.Module) -> list[str]:
    """The spectral layers or, if there are none, the first batch norm, in whose place one would be."""
    if spectral := spectral_layers(model):
        return list(spectral)
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)][:1]


def _say_where_olr_did_nothing(module: Classifier) -> None:
    """As on a weight in front of a norm: η* is proportional to ⟨W, ∂l/∂W⟩, which is 0 for a loss that does not depend
    on the length of W (Euler's theorem)."""
    olr = module.treatment.olr if module.treatment is not None else None
    idle = [name for name, counts in olr.counts().items() if not counts["shortened"]] if olr is not None else []
    if idle:
        log.warning(
            "olr shortened no step of %s and so changed nothing; its rate is 0 and not used where a norm follows, and "
            "elsewhere was not below the learning rate",
            listed([f"'{name}'" for name in idle]),
        )


def _train(
    config: RunConfig,
    folder: Path,
    start: Start,
    module: Classifier,
    images: ImageDataModule,
    progress: bool,
) -> RunResult:
    """Fit, test once with the final weights, and write `result.json` (rank 0)."""
    run_log, best = RunLog(folder), BestAndLast(folder / CHECKPOINTS)
    monitor = ConditionMonitorCallback(
        every=config.monitor_every, layers=observed_layers(module), writers=[folder / CONDITION]
    )
    callbacks: list[pl.Callback] = [monitor, run_log, best]
    if progress:
        callbacks.append(ProgressBar(run_log))
    if config.compile:
        compile_stages(module.model)
    tests = batches(config, images.data, augment=False)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    several = config.devices > 1
    with group_ends_first() if several else nullcontext(), quiet(), Interruptions() as interruptions:
        callbacks.append(interruptions)
        trainer = pl.Trainer(
            accelerator="auto",
            devices=local_processes,
            num_nodes=config.devices // local_processes,
            strategy="ddp" if several else "auto",
            precision=config.precision,  # pyright: ignore[reportArgumentType]
            max_epochs=config.epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=TensorBoardLogger(folder, name="", version="", purge_step=start[1]),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module gives each rank its share
        )
        try:
            trainer.fit(module, datamodule=images, ckpt_path=start[0])
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}. {keep_last(monitor.records, folder)}") from error
        if trainer.interrupted:
            raise KeyboardInterrupt
    if trainer.is_global_zero and trainer.global_step >= ENOUGH_STEPS:
        _say_where_olr_did_nothing(module)
    device = trainer.strategy.root_device
    test = evaluate(module.model, tests, device)
    assert monitor.monitor is not None  # made by `fit`
    result = RunResult(
        config=config,
        folder=str(folder),
        test_error=1 - test.accuracy,
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_top5_error=test.top5_error,
        best_val_accuracy=best.best_accuracy,
        best_epoch=best.best_epoch,
        steps=trainer.global_step,
        seconds=run_log.seconds,
        seconds_per_step=run_log.seconds_per_step(),
        conditions=tuple(LayerCondition.of(name, found) for name, found in monitor.monitor.statistics().items()),
        environment={**versions(), "lightning": lightning.__version__, **hardware(), "device": str(device)},
    )
    if trainer.is_global_zero:
        result.save()
        (folder / LAST_CONDITION).unlink(missing_ok=True)  # from an earlier attempt that diverged
    return result
