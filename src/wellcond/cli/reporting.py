"""What a command prints, and how it ends: an error is one line, and so is an interruption."""

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

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the processes of torchrun, one prints
stderr = Console(stderr=True)


def say(line: str, to: Console = console) -> None:
    """Print a line as it is."""
    to.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


class _Lines(logging.Handler):
    """What the library has to say, a line each on the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), stderr)


@contextmanager
def reporting(debug: bool, level: int, how_to_go_on: list[str]) -> Iterator[None]:
    """Turn what goes wrong inside into one line and an exit status; `how_to_go_on` may be filled inside."""
    log, handler = logging.getLogger("wellcond"), _Lines()
    log.addHandler(handler)
    log.setLevel(level)
    try:
        with _terminable():
            yield
    except KeyboardInterrupt as stopped:
        what, status = ("terminated", 143) if isinstance(stopped, Terminated) else ("interrupted", 130)
        again = "".join(f"; go on with: {command}" for command in how_to_go_on)
        if not console.quiet:
            say(f"{what}{'; finished epochs are kept' if how_to_go_on else ''}{again}", stderr)
        raise typer.Exit(status) from None
    except (RunError, ValueError, OSError, ImportError) as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            said = f"the package '{error.name}' is not installed: pip install \"wellcond[train]\""
        elif isinstance(error, UnicodeEncodeError):  # such as a path that was typed in another encoding
            said = f"{error.object!a} has letters that this locale lacks; set PYTHONUTF8=1"
        else:
            said = str(error) or type(error).__name__
        say(f"error: {said}", stderr)
        raise typer.Exit(2) from None
    finally:
        log.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside, once: schedulers repeat it, and the end is not to be disturbed."""
    if threading.current_thread() is not threading.main_thread():  # where no signal handler can be set
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
