"""Errors of a run that its user can act on; the command line prints their one line without a traceback."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""


class FolderError(RunError):
    """An output folder holds something that would be lost, or lacks what should be there."""


class NonFiniteLossError(RunError):
    """The training loss became NaN or infinite."""
