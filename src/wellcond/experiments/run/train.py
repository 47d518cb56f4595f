"""A run from its configuration to its result, in its folder; alone, or as several processes.

    RUN/config.json  metrics.csv  condition.csv  events.out.tfevents.*  result.json
    RUN/checkpoints/{best,last,previous}.ckpt

`result.json` is written last: a folder that has it is a finished run, one that lacks it can be resumed. A finished
run that is made longer keeps its result as `result.N-epochs.json`.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from wellcond.experiments import folders
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.errors import ConfigError, NonFiniteLossError, RunError, needs_train_extra
from wellcond.experiments.run.build import batches, build
from wellcond.experiments.run.checkpoints import (
    BEST,
    DAMAGED,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    BestAndLast,
    newest_readable,
)
from wellcond.experiments.run.compiled import compile_stages
from wellcond.experiments.run.config import BEFORE, RunConfig
from wellcond.experiments.run.divergence import LAST_CONDITION, keep_last
from wellcond.experiments.run.log import ProgressBar, RunLog
from wellcond.experiments.run.processes import interruptible, quiet, spawn, threads
from wellcond.experiments.run.result import (
    CONDITION,
    EARLIER_RESULT,
    METRICS,
    RESULT,
    LayerCondition,
    RunResult,
    hardware,
    load_result,
    versions,
)
from wellcond.experiments.run.schedule import Schedule
from wellcond.experiments.run.training import Classifier, evaluate, spectral_layers
from wellcond.lightning import ConditionMonitorCallback

with needs_train_extra():
    import lightning
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.loggers import TensorBoardLogger

KIND = "run"
CHECKPOINTS = "checkpoints"
MADE = (
    *(folders.CONFIG, METRICS, CONDITION, LAST_CONDITION, RESULT, EARLIER_RESULT.format("*")),
    *("events.out.tfevents.*", "hparams.yaml", ".*.part"),
    *(f"{CHECKPOINTS}/*.ckpt", f"{CHECKPOINTS}/*.ckpt{DAMAGED}", f"{CHECKPOINTS}/.*.part"),
)

Start = tuple[Path | None, int]
"""The checkpoint to go on from and the steps finished in it."""
BEGINNING: Start = (None, 0)

log = logging.getLogger("wellcond")


def run(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: ImageData | None = None,
    progress: bool = False,
) -> RunResult:
    """Train `config` to the end in `folder`, and test it.

    Args:
        resume: continue the run that `folder` holds, from the end of its last finished epoch; a finished one is only
            read back, or where `config` has more epochs than it trained on, at the rates that the schedule of all
            of them has from there.
        overwrite: delete the run that `folder` holds (its own files only) and start afresh.
        data: the images, if they are loaded already.
        progress: show a progress bar.

    Raises:
        RunError: the folder holds something else, another process is at work in it, no checkpoint can be read, the
            disk is full, or the loss is not finite. What was there, and the checkpoints of finished epochs, remain.
        ValueError: the data, the model or the treatment cannot be made as `config` says; nothing was written.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    folder = Path(folder)
    torchrun = "RANK" in os.environ
    if torchrun and config.devices != int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"devices is {config.devices}, but torchrun started {os.environ['WORLD_SIZE']} processes")
    leader = not torchrun or os.environ["RANK"] == "0"  # rank 0 alone minds the folder

    def check() -> None:
        _check(folder, config, resume, overwrite)

    if leader:
        check()
    finished = load_result(folder) if resume else None
    if finished is not None and finished.config.epochs == config.epochs:
        return finished
    with folders.claimed(folder, check) if leader else nullcontext(), threads(config.threads):
        module, images = build(config, data)
        if leader and not resume:
            folders.prepare(folder, KIND, config.to_dict(), MADE)
        start = _where_it_stopped(folder, module, leader) if resume else BEGINNING
        if leader and resume:
            _lengthen(folder, config)
        if config.devices == 1 or torchrun:
            return _train(config, folder, start, module, images, progress)
        spawn(_process, config.devices, config, folder, start, progress)
    result = load_result(folder)
    if result is None:
        raise RunError(f"the processes of '{folder}' ended without a result; go on with --resume")
    return result


def _check(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost, or that holds another run than the one to resume."""
    held = {**BEFORE, **folders.check(folder, KIND, resume=resume, overwrite=overwrite)}
    if not resume:
        return
    finished = load_result(folder)
    longer = finished is not None and finished.config.epochs < config.epochs
    asked = replace(config, epochs=held["epochs"]) if longer else config
    folders.refuse_conflicts(held, asked.to_dict(), folder)
    if longer and not any((folder / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS, BEST)):
        raise RunError(f"'{folder}' has no checkpoint to train on from; make a longer run in another --out")


def _lengthen(folder: Path, config: RunConfig) -> None:
    """Make a run that has finished with fewer epochs an unfinished one; its result stays under another name."""
    finished = load_result(folder)
    if finished is None or finished.config.epochs >= config.epochs:
        return
    before, after = finished.config.epochs, config.epochs
    folders.mark(folder, KIND, config.to_dict())
    os.replace(folder / RESULT, folder / EARLIER_RESULT.format(before))
    factor = Schedule.parse(config.schedule).factor
    was, now = (config.lr * factor(finished.steps, finished.steps * epochs // before) for epochs in (before, after))
    log.warning(
        "training on from %d to %d epochs, at the learning rates that the schedule of %d epochs has from there: "
        "%g, where it was %g",
        *(before, after, after, now, was),
    )


def _process(config: RunConfig, folder: Path, start: Start, progress: bool) -> None:
    """One of several processes. What there is to say of the data was said by the one that started it."""
    logging.getLogger("wellcond.experiments.data").setLevel(logging.ERROR)
    with threads(config.threads):
        _train(config, folder, start, *build(config, None), progress)


def _where_it_stopped(folder: Path, module: Classifier, leader: bool) -> Start:
    """Where to go on from. Without any checkpoint the training begins again, and what it had measured goes.

    From a checkpoint the callbacks go on with their files as they were when it was written.
    """
    if not any((folder / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS, BEST)):
        if leader:
            for name in (METRICS, CONDITION):
                (folder / name).unlink(missing_ok=True)
        return BEGINNING
    path, checkpoint, troubles = newest_readable(folder / CHECKPOINTS)
    states = (checkpoint["state_dict"], module.state_dict())
    held, wanted = ({name: getattr(value, "shape", None) for name, value in state.items()} for state in states)
    if held != wanted:
        raise RunError(f"the weights in '{path}' are not those of the run beside it: start afresh with --overwrite")
    if troubles and leader:
        for damaged in troubles:
            damaged.replace(damaged.with_name(damaged.name + DAMAGED))
        said = "; ".join(f"{trouble}, and is set aside as '{name.name}{DAMAGED}'" for name, trouble in troubles.items())
        log.warning("%s; going on from '%s', after epoch %d", said, path.name, checkpoint["epoch"] + 1)
    return path, checkpoint["global_step"]


def observed_layers(model: nn.Module) -> list[str]:
    """The spectral layers, or without any the first batch norm: where a decorrelated one would sit."""
    if spectral := spectral_layers(model):
        return list(spectral)
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)][:1]


def _train(
    config: RunConfig,
    folder: Path,
    start: Start,
    module: Classifier,
    images: ImageDataModule,
    progress: bool,
) -> RunResult:
    """Fit, test once with the last weights, and write `result.json` (rank 0)."""
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
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine
    with quiet(), interruptible() as keep_sigterm:
        callbacks.append(LambdaCallback(on_train_start=keep_sigterm))
        trainer = pl.Trainer(
            accelerator="auto",
            devices=here,
            num_nodes=config.devices // here,
            strategy="ddp" if config.devices > 1 else "auto",
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
        (folder / LAST_CONDITION).unlink(missing_ok=True)  # of an attempt that diverged where this one did not
    return result
