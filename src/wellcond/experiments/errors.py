"""User errors; the command line prints them as one line without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, sent by schedulers to end a run: handled like Ctrl-C, with its own exit status."""


class RunError(Exception):
    """A run cannot start or continue; the message says why and what to do."""


class FolderError(RunError):
    """An output folder holds data that would be lost, or lacks what should be there."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or none of a run's checkpoints can be read."""


class NonFiniteLossError(RunError):
    """The training loss became NaN or infinite."""


class ConfigError(ValueError):
    """An invalid configuration; the message contains the value and, for a name, the closest valid one."""


class DataError(ValueError):
    """Images cannot be used; the message says where, what was expected, and what to do."""


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
