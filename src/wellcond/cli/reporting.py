"""The output of a command and its exit: an error or an interruption is one line."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from wellcond.experiments.errors import RunError, Terminated

console: Console = Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun only rank 0 prints
stderr: Console = Console(stderr=True)


def say(line: str, to: Console = console) -> None:
    """Print a line verbatim."""
    to.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


class _StderrHandler(logging.Handler):
    """The library's log messages on standard error, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), stderr)


@contextmanager
def reporting(debug: bool, level: int, resume_commands: list[str]) -> Iterator[None]:
    """Turn exceptions inside into one line and an exit status; `resume_commands` may be filled inside."""
    log, handler = logging.getLogger("wellcond"), _StderrHandler()
    if not any(isinstance(outer, _StderrHandler) for outer in log.handlers):  # of a command that runs this one
        log.addHandler(handler)
    log.setLevel(level)
    try:
        with _terminable():
            yield
    except KeyboardInterrupt as stopped:
        what, status = ("terminated", 143) if isinstance(stopped, Terminated) else ("interrupted", 130)
        resume = "".join(f"; go on with: {command}" for command in resume_commands)
        if not console.quiet:
            say(f"{what}{'; what was saved is kept' if resume_commands else ''}{resume}", stderr)
        raise typer.Exit(status) from None
    except (RunError, ValueError, OSError, ImportError) as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            message = f"the package '{error.name}' is not installed: pip install \"wellcond[train]\""
        elif isinstance(error, UnicodeEncodeError):  # such as a path typed in another encoding
            message = f"{error.object!a} has characters that this locale lacks; set PYTHONUTF8=1"
        else:
            message = str(error) or type(error).__name__
        say(f"error: {message}", stderr)
        raise typer.Exit(2) from None
    finally:
        log.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let the first SIGTERM raise `Terminated`; further ones, which schedulers send, must not disturb the shutdown."""
    if threading.current_thread() is not threading.main_thread():  # signal handlers need the main thread
        yield
        return

    def terminate(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
