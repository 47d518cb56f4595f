"""One run of a grid, in whatever process: what went wrong comes back as a line, so that the other runs go on."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.run.build import load
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.train import run

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What stops every run: there is no place to write to."""


@dataclass(frozen=True)
class Task:
    """A run to train in ``folder``, or to go on with."""

    config: RunConfig
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How it ended. The result is in the folder."""

    trouble: str = ""  # a line; empty where the run has finished
    details: str = ""  # the traceback
    hopeless: bool = False  # whether the others would fail for the same reason
    said: tuple[tuple[int, str], ...] = ()  # levels and messages of the library's log


Outcomes = Generator[tuple[int, Outcome], None, None]
"""The place of a task and how it ended, as they end; what is under way ends when the generator is closed."""
Executor = Callable[[Sequence[Task]], Outcomes]


def attempt(task: Task, data: ImageData | None = None, progress: bool = False) -> Outcome:
    """Train the run, from its last checkpoint where it has begun; ``data`` is kept for the next run of this process."""
    begun = (task.folder / folders.CONFIG).exists()
    try:
        run(task.config, task.folder, resume=begun, data=data or _images(task.config), progress=progress)
    except Exception as error:
        said = str(error) or type(error).__name__
        expected = type(error).__module__.startswith("wellcond.") or isinstance(error, (ValueError, OSError))
        numbers = {getattr(one, "errno", None) for one in (error, error.__cause__)}
        return Outcome(
            " ".join((said if expected else f"{type(error).__name__}: {said}").split()),
            traceback.format_exc(),
            hopeless=bool(numbers & DISK),
        )
    return Outcome()


def attempt_elsewhere(task: Task) -> Outcome:
    """`attempt` in a process of its own, whose log comes back with the outcome."""
    with _log_kept() as said:
        outcome = attempt(task)
    return Outcome(outcome.trouble, outcome.details, outcome.hopeless, tuple(said))


_KEPT: dict[tuple[Any, ...], ImageData] = {}
"""The images that this process has loaded last."""


def _images(config: RunConfig) -> ImageData:
    key = same_images(config)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = load(config)
    return _KEPT[key]


def same_images(config: RunConfig) -> tuple[Any, ...]:
    """Of two configurations it is equal if they are trained on the same images in the same form."""
    return config.data, config.image_size, config.limit, config.crop == "resized"


@contextmanager
def _log_kept() -> Iterator[list[tuple[int, str]]]:
    """The warnings inside. What there is to say of the data was said by the process that began the grid."""
    said: list[tuple[int, str]] = []
    log, handler = logging.getLogger("wellcond"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append((record.levelno, record.getMessage()))
    logging.getLogger("wellcond.experiments.data").setLevel(logging.ERROR)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.propagate = before


def here(data: ImageData, progress: bool) -> Executor:
    """One task after the other in this process."""

    def train(tasks: Sequence[Task]) -> Outcomes:
        for place, task in enumerate(tasks):
            yield place, attempt(task, data, progress)

    return train


def alone_on_its_cpu() -> None:
    """One CPU thread for each of several processes, as long as a configuration does not say another number."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
