"""Ctrl-C and SIGTERM during Lightning's training: they take effect between two batches.

Raised anywhere, an interruption could meet a lock that a logger holds, and the shutdown, which flushes that logger,
would wait for it for ever.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

from wellcond.experiments.errors import Terminated, needs_train_extra

with needs_train_extra():
    import lightning.pytorch as pl

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 1.0
"""Seconds after which a further signal does not wait: it is a second one, and not the same sent to a group and to each
of its processes."""


class Interruptions(pl.Callback, AbstractContextManager[Any]):
    """Calls the handlers of SIGINT and SIGTERM between batches; a second signal, a second later, does not wait.

    Afterwards the handlers are those of before: Lightning leaves SIGINT ignored, and its own handler of SIGTERM would
    exit with status 0. Signals that are ignored or have the system's handler are left alone, as is everything outside
    the main thread.

    An interruption leaves the context as itself, and not as Lightning's `SystemExit` after it. Nor does an error hide
    it that was raised while it waited or during the shutdown: SIGTERM to a group kills the workers of a loader too, and
    PyTorch raises an error for each of them, wherever the training is.
    """

    def __init__(self) -> None:
        self._waiting: list[signal.Signals] = []
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._outside: BaseException | None = None

    def __enter__(self) -> Self:
        self._outside = sys.exception()
        if threading.current_thread() is threading.main_thread():  # signal handlers need the main thread
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if handler is not None}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        interruption = self._interruption(error)
        for number, handler in self._before.items():
            if number == signal.SIGINT or signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        if isinstance(interruption, Terminated) and self._before:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as its handler left it, before Lightning restored that
            if hasattr(signal, "SIGCHLD"):  # PyTorch's handler raises wherever a worker of a loader is found dead
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if interruption is not None:
            raise type(interruption) from None
        if error is None or isinstance(error, Exception):
            self._call()

    def on_train_start(self, *_: Any, **__: Any) -> None:
        """Put the handlers in place, after Lightning has put its own."""
        for number, handler in self._before.items():
            signal.signal(number, self._note if callable(handler) else handler)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._call()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._call()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._waiting:
            self._first = now
        elif now - self._first > AT_ONCE:
            self._before[signal.Signals(number)](number, frame)
            return
        self._waiting.append(signal.Signals(number))

    def _call(self) -> None:
        waiting = list(dict.fromkeys(self._waiting))
        self._waiting.clear()
        for number in waiting:
            self._before[number](number, None)

    def _interruption(self, error: BaseException | None) -> KeyboardInterrupt | None:
        """The interruption that this error is, or in whose handling it was raised inside the context."""
        while error is not None and error is not self._outside:
            if isinstance(error, KeyboardInterrupt):
                return error
            error = error.__context__
        return None
