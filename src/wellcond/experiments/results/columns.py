"""Arrow columns of result tables: types from the fields of a dataclass, and units."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.files import write_atomically
from wellcond.experiments.run.result import RunResult

with needs_train_extra():
    import pyarrow as pa
    import pyarrow.parquet as pq

UNITS = {
    "training_seconds": "s",
    "seconds_per_step": "s",
    "test_loss": "nat",
    "step": "step",
    "steps": "step",
    "monitor_every": "step",
    "epochs": "epoch",
    "best_epoch": "epoch, counted from 0",
}


def _without_none(hint: Any) -> type:
    """`int` for `int | None`."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not types.NoneType]
    return kinds[0]


def types_of(kind: type, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The Arrow type of each field of a dataclass."""
    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    hints = get_type_hints(kind)
    return {f.name: arrow[_without_none(hints[f.name])] for f in fields(kind) if f.name not in leave_out}


def _unit(column: str) -> str:
    for ending in ("percent", "fraction"):
        if column.endswith(ending):
            return ending
    return UNITS.get(column, "1")


def schema(columns: Mapping[str, Any]) -> Any:
    """An Arrow schema of columns by name and type, with units as metadata."""
    return pa.schema([pa.field(name, kind, metadata={"unit": _unit(name)}) for name, kind in columns.items()])


def place_of(result: RunResult, out: Path) -> str:
    """The folder of a run, relative to that of the comparison if inside it."""
    folder = Path(result.folder)
    return (folder.relative_to(out) if folder.is_relative_to(out) else folder.resolve()).as_posix()


def write_table(path: Path, table: Any) -> None:
    """Write a Parquet file, atomically."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd")
    write_atomically(path, stream.getvalue().to_pybytes())
