"""Ctrl-C and SIGTERM during Lightning's training: they take effect between two batches.

Raised anywhere, an interruption could meet a lock that a logger holds, and the shutdown, which flushes that logger,
would wait for it for ever.
"""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

from wellcond.experiments.errors import needs_train_extra

with needs_train_extra():
    import lightning.pytorch as pl

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions(pl.Callback, AbstractContextManager[Any]):
    """Calls the handlers of SIGINT and SIGTERM between batches; a second SIGINT does not wait.

    Inside the context Lightning's `SystemExit` after an interrupt is the interrupt itself, and afterwards the handlers
    are those of before: Lightning leaves SIGINT ignored, and its own handler of SIGTERM would exit with status 0.
    Signals that are ignored or have the system's handler are left alone, as is everything outside the main thread.
    """

    def __init__(self) -> None:
        self._waiting: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signal handlers need the main thread
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._before.items():
            if number == signal.SIGINT or signal.getsignal(number) == self._note:  # SIGTERM may be ignored by now
                signal.signal(number, handler)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise type(error.__context__) from None
        if error is None:
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
        if self._waiting and number == signal.SIGINT:
            self._before[signal.SIGINT](number, frame)
        self._waiting.append(signal.Signals(number))

    def _call(self) -> None:
        if self._waiting:
            number = self._waiting[0]
            self._waiting.clear()
            self._before[number](number, None)
