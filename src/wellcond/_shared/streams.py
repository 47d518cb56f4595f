"""Standard streams that never abort the program: unsupported characters are replaced, and the reader may close."""

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
    """Encoding error handler: `κ` becomes `k` where there is no Greek; characters without a substitute are escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    near = letter.translate(_IN_ASCII)
    if near == letter:
        near = letter.encode("ascii", "backslashreplace").decode()
    return near, error.start + 1


class _Pipe(io.FileIO):
    """A file that discards its output once nobody reads it (`| head -1`)."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for child processes
            os.close(nowhere)
            return len(data)


def make_patient() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that tolerate unsupported characters and a closed pipe."""
    codecs.register_error("wellcond", _nearest)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # absent, or replaced by someone else
            continue
        stream.reconfigure(errors="wellcond")
        if not stream.isatty():
            stream.flush()
            pipe = io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False))
            setattr(
                sys, name, io.TextIOWrapper(pipe, stream.encoding, "wellcond", line_buffering=stream.line_buffering)
            )
