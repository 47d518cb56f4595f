"""Writers of records: CSV, JSON lines, TensorBoard. A writer is a callable that takes a ConditionRecord.

The file writers open, append and close the file for each record, so that a killed run loses nothing. ``rewind`` drops
the records that a resumed run will measure again.
"""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ._record import FIELDS, ConditionRecord

Writer = Callable[[ConditionRecord], Any]


class _FileWriter:
    """A text file with one line per record."""

    header = ""
    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, record: ConditionRecord) -> None:
        """Append the record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            if file.tell() == 0:
                file.write(self.header)
            self._write(file, record)

    def rewind(self, step: int) -> None:
        """Drop the lines of ``step`` and later, and truncated ones; the file is replaced atomically."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if self._is_before(line, step)]
        if len(kept) < len(lines):
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self.path)

    def _is_before(self, line: str, step: int) -> bool:
        try:
            return line == self.header or (line.endswith("\n") and self._step(line) < step)
        except ValueError:  # a line truncated by a crash and continued by the next record
            return False

    def _write(self, file: TextIO, record: ConditionRecord) -> None:
        raise NotImplementedError

    def _step(self, line: str) -> int:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class CSVWriter(_FileWriter):
    """Comma-separated values with a header: ``step,layer,kappa,…``, infinity as ``inf``.

    Args:
        path: of the file, created with the first record and appended to.

    Example:
        >>> import tempfile
        >>> from wellcond.monitor import CSVWriter
        >>> writer = CSVWriter(tempfile.mkdtemp() + "/condition.csv")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._columns: tuple[str, ...] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of an existing file, possibly fewer if an older version started it; otherwise all fields."""
        if self._columns is None and self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                found = tuple(next(csv.reader(file), ()))
            self._columns = found if "step" in found and set(found) <= set(FIELDS) else None
        return self._columns or FIELDS

    @property
    def header(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ",".join(self.columns) + "\n"

    def _write(self, file: TextIO, record: ConditionRecord) -> None:
        values = record.as_dict()
        csv.writer(file, lineterminator="\n").writerow(values[name] for name in self.columns)

    def _step(self, line: str) -> int:
        return int(dict(zip(self.columns, next(csv.reader([line])), strict=True))["step"])


class JSONLinesWriter(_FileWriter):
    """One JSON object per line; infinity and NaN, which JSON lacks, are the strings ``"inf"`` and ``"nan"``.

    Args:
        path: of the file, created with the first record and appended to.

    Example:
        >>> import tempfile
        >>> from wellcond.monitor import JSONLinesWriter
        >>> writer = JSONLinesWriter(tempfile.mkdtemp() + "/condition.jsonl")
    """

    def _write(self, file: TextIO, record: ConditionRecord) -> None:
        values = record.as_dict()
        not_json = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        file.write(json.dumps(values | not_json, ensure_ascii=False, allow_nan=False) + "\n")

    def _step(self, line: str) -> int:
        return json.loads(line)["step"]


class TensorBoardWriter:
    """Scalars ``{tag}/{layer}/kappa`` … to a given ``SummaryWriter``, which the caller closes.

    Args:
        summary_writer: any object with ``add_scalar(name, value, step)``.
        tag: prefix of the names.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, name, value, step):
        ...         print(name, step)
        >>> import torch
        >>> from wellcond.monitor import ConditionMonitor
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> with ConditionMonitor(model, layers=["0"], writers=TensorBoardWriter(Printer(), tag="seen")):
        ...     y = model(torch.randn(8, 2))  # doctest: +ELLIPSIS
        seen/0/kappa 0
        ...
    """

    def __init__(self, summary_writer: Any, tag: str = "condition") -> None:
        self.summary_writer = summary_writer
        self.tag = tag

    def __call__(self, record: ConditionRecord) -> None:
        """Add the record's measures, failures and retries at its step."""
        counts = {f"{self.tag}/{record.layer}/{name}": getattr(record, name) for name in ("failures", "retries")}
        for name, value in (record.scalars(self.tag) | counts).items():
            self.summary_writer.add_scalar(name, value, record.step)


def deliver(record: ConditionRecord, writer: Writer) -> None:
    """Write the record. A full disk only warns: training continues and keeps its records in memory."""
    try:
        writer(record)
    except OSError as error:
        warnings.warn(f"{writer!r} could not write step {record.step}: {error}", RuntimeWarning, stacklevel=3)


def as_writers(targets: Any) -> list[Writer]:
    """Writers for paths (``.csv``, ``.jsonl``), SummaryWriters and callables: one, several, or None.

    Returns:
        A list of callables that take a :class:`ConditionRecord`.

    Raises:
        ValueError: a path with another suffix.

    Example:
        >>> as_writers(None), as_writers(["condition.csv", print])
        ([], [CSVWriter('condition.csv'), <built-in function print>])
    """
    if targets is None:
        return []
    if isinstance(targets, (str, os.PathLike)) or callable(targets) or hasattr(targets, "add_scalar"):
        targets = [targets]
    return [_as_writer(target) for target in targets]


def _as_writer(target: Any) -> Writer:
    if isinstance(target, (str, os.PathLike)):
        kinds = {".csv": CSVWriter, ".jsonl": JSONLinesWriter}
        suffix = Path(target).suffix
        if suffix not in kinds:
            raise ValueError(f"unknown format of '{os.fspath(target)}': the path must end in {' or '.join(kinds)}")
        return kinds[suffix](target)
    if hasattr(target, "add_scalar"):
        return TensorBoardWriter(target)
    if not callable(target):
        raise TypeError(f"a writer is a path, a SummaryWriter or a callable, got {type(target).__name__}")
    return target
