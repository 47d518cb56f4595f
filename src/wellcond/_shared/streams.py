"""Standard streams that never end the work behind them: letters that they lack are replaced, a reader may leave."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any

_IN_ASCII = str.maketrans(
    {"κ": "k", "ε": "e", "λ": "l", "±": "+-", "×": "x", "·": ".", "…": "...", "²": "2"}
    | dict.fromkeys("–—−", "-")
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("“”", '"')
    | {"\N{NO-BREAK SPACE}": " "}
)


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """A handler of encoding errors: `κ` is `k` where there is no Greek, and what has no likeness is an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    near = letter.translate(_IN_ASCII)
    if near == letter:
        near = letter.encode("ascii", "backslashreplace").decode()
    return near, error.start + 1


class _Pipe(io.FileIO):
    """A file that is written on as if nothing were amiss when nobody reads it any more (`| head -1`)."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for the processes that are started, too
            os.close(nowhere)
            return len(data)


def make_patient() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that raise neither for a letter nor for a closed pipe."""
    codecs.register_error("wellcond", _nearest)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # none, or someone else's
            continue
        stream.reconfigure(errors="wellcond")
        if not stream.isatty():
            stream.flush()
            pipe = io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False))
            setattr(
                sys, name, io.TextIOWrapper(pipe, stream.encoding, "wellcond", line_buffering=stream.line_buffering)
            )
