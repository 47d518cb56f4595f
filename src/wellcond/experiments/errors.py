"""Errors that a user can act on; the command line prints their one line without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end a run: it goes the way of Ctrl-C, and has an exit status of its own."""


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""


class FolderError(RunError):
    """An output folder holds something that would be lost, or lacks what should be there."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or none of a run's checkpoints can be read."""


class NonFiniteLossError(RunError):
    """The training loss became NaN or infinite."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message holds the value and, for a name, the nearest one."""


class DataError(ValueError):
    """Images cannot be used as they are; the message names the place, what was expected, and what to do."""


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Turn a failed import inside the block into an `ImportError` that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"wellcond.experiments needs the package '{error.name}', which is not installed: "
            "pip install 'wellcond[train]'",
            name=error.name,
        ) from error
