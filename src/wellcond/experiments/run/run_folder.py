"""The folder of a run: its files, whether it may be written, and where a resumed run continues.

    RUN/config.json  metrics.csv  condition.csv  events.out.tfevents.*  result.json
    RUN/checkpoints/{best,last,previous}.ckpt

`result.json` is written last: a folder with it is a finished run, one without it can be resumed. A finished run that is
extended to more epochs keeps its result as `result.N-epochs.json`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from wellcond.experiments import folders
from wellcond.experiments.errors import RunError
from wellcond.experiments.run.checkpoints import BEST, DAMAGED, LAST, PREVIOUS, newest_readable
from wellcond.experiments.run.config import BEFORE, RunConfig
from wellcond.experiments.run.divergence import LAST_CONDITION
from wellcond.experiments.run.result import CONDITION, EARLIER_RESULT, METRICS, RESULT, load_result
from wellcond.experiments.run.schedule import Schedule

KIND = "run"
CHECKPOINTS = "checkpoints"
EVENTS = "events.out.tfevents.*"
MADE = (
    *(folders.CONFIG, METRICS, CONDITION, LAST_CONDITION, RESULT, EARLIER_RESULT.format("*")),
    *(EVENTS, "hparams.yaml", ".*.part"),
    *(f"{CHECKPOINTS}/*.ckpt", f"{CHECKPOINTS}/*.ckpt{DAMAGED}", f"{CHECKPOINTS}/.*.part"),
)

Start = tuple[Path | None, int]
"""The checkpoint to continue from and its number of steps."""
BEGINNING: Start = (None, 0)

log: logging.Logger = logging.getLogger("wellcond")


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS, BEST))


def check(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Raise a `RunError` if data in the folder would be lost, or if it holds another run than the one to resume."""
    held = {**BEFORE, **folders.check(folder, KIND, resume=resume, overwrite=overwrite)}
    if not resume:
        return
    finished = load_result(folder)
    longer = finished is not None and finished.config.epochs < config.epochs
    asked = replace(config, epochs=held["epochs"]) if longer else config
    folders.refuse_conflicts(held, asked.to_dict(), folder)
    if longer and not _has_checkpoint(folder):
        raise RunError(f"'{folder}' has no checkpoint to train on from; make a longer run in another --out")


def extend(folder: Path, config: RunConfig) -> None:
    """Turn a run that finished with fewer epochs into an unfinished one, keeping its result under another name."""
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


def starting_point(folder: Path, module: nn.Module, leader: bool) -> Start:
    """Where to resume. Without a checkpoint training starts over, and earlier measurements are deleted.

    With a checkpoint the callbacks restore their files to its state.
    """
    if not _has_checkpoint(folder):
        if leader:
            for pattern in (METRICS, CONDITION, EVENTS):
                for path in folder.glob(pattern):
                    path.unlink()
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
