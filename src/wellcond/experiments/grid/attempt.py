"""One run of a grid in any process. Errors are returned as a line, so that the other runs continue."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.run.build import build, load
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.processes import threads
from wellcond.experiments.run.result import load_result
from wellcond.experiments.run.train import run

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Errors that stop every run: no place to write to."""


@dataclass(frozen=True)
class Work:
    """How the runs of one kind are done: all are functions of modules, which other processes import.

    ``train(config, folder, resume=, data=, progress=)``; ``load(config)`` of its images, and ``images_of(config)``,
    which is equal for configurations with the same images; ``result(folder)`` of a finished run, or None;
    ``build(config, images)``, which raises what training would, and writes nothing.
    """

    train: Callable[..., Any]
    load: Callable[[Any], Any]
    images_of: Callable[[Any], tuple[Any, ...]]
    result: Callable[[Path], Any]
    build: Callable[[Any, Any], Any]


def same_images(config: RunConfig) -> tuple[Any, ...]:
    """A key that is equal for configurations trained on the same images in the same form."""
    return config.data, config.image_size, config.limit, config.crop == "resized"


CLASSIFIERS = Work(run, load, same_images, load_result, build)


@dataclass(frozen=True)
class Task:
    """A run to train or continue in ``folder``, on this number of CPU threads if its configuration leaves it open."""

    config: Any
    folder: Path
    work: Work = CLASSIFIERS
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The result is in its folder."""

    trouble: str = ""  # one line; empty if the run has finished
    details: str = ""  # the traceback
    hopeless: bool = False  # the other runs would fail for the same reason
    said: tuple[tuple[int, str], ...] = ()  # levels and messages logged by the library


Outcomes = Generator[tuple[int, Outcome], None, None]
"""Pairs (index of the task, outcome) in the order of completion. Closing the generator stops running tasks."""
Executor = Callable[[Sequence[Task]], Outcomes]


def attempt(task: Task, data: Any = None, progress: bool = False) -> Outcome:
    """Train the run, continuing from its last checkpoint if there is one."""
    begun = (task.folder / folders.CONFIG).exists()
    try:
        images = _images(task) if data is None else data
        with threads(task.threads):
            task.work.train(task.config, task.folder, resume=begun, data=images, progress=progress)
    except Exception as error:
        message = str(error) or type(error).__name__
        if not (type(error).__module__.startswith("wellcond.") or isinstance(error, (ValueError, OSError))):
            message = f"{type(error).__name__}: {message}"
        numbers = {getattr(cause, "errno", None) for cause in (error, error.__cause__)}
        return Outcome(" ".join(message.split()), traceback.format_exc(), hopeless=bool(numbers & DISK))
    return Outcome()


def attempt_elsewhere(task: Task) -> Outcome:
    """`attempt` in a worker process, whose log is returned with the outcome."""
    with _captured_log() as messages:
        outcome = attempt(task)
    return replace(outcome, said=tuple(messages))


_CACHE: dict[tuple[Any, ...], Any] = {}
"""The images last loaded by this process, reused by its next run."""


def _images(task: Task) -> Any:
    key = (task.work.load, *task.work.images_of(task.config))
    if key not in _CACHE:
        _CACHE.clear()
        _CACHE[key] = task.work.load(task.config)
    return _CACHE[key]


@contextmanager
def _captured_log() -> Iterator[list[tuple[int, str]]]:
    """The warnings logged inside, except those about the data, which the main process has already logged."""
    messages: list[tuple[int, str]] = []
    log, handler = logging.getLogger("wellcond"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append((record.levelno, record.getMessage()))
    logging.getLogger("wellcond.experiments.data").setLevel(logging.ERROR)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = before


def in_this_process(data: Any, progress: bool) -> Executor:
    """Runs one task after another in this process."""

    def train(tasks: Sequence[Task]) -> Outcomes:
        for index, task in enumerate(tasks):
            yield index, attempt(task, data, progress)

    return train


def use_one_thread() -> None:
    """Use one CPU thread in this worker process, unless a configuration sets another number."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
