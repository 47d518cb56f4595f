"""Atomic writes of bytes, JSON and CSV: to a temporary file, flushed to disk, then renamed over the target.

A rename within one directory is atomic (POSIX `rename`), so a full disk, a crash or Ctrl-C during a write leaves the
old file intact.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def part_of(path: Path) -> Path:
    """The temporary file, before it is renamed."""
    return path.with_name(f".{path.name}.part")


def write_atomically(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write `data` to `path`, or leave the file unchanged and raise the `OSError`.

    The old file is kept as `previous` if that is given.
    """
    part = part_of(path)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)  # the data must reach the disk before the name does
        finally:
            os.close(descriptor)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """`value` for strict JSON: NaN and ±infinity become the strings `nan`, `inf`, `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented strict JSON, atomically."""
    write_atomically(path, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as CSV with a header line, atomically; floats keep all digits (`repr`)."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
