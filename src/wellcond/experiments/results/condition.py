"""The condition records of runs as one table.

OUT/condition.parquet    one row per run, layer and recorded step: κ, ranks, extreme eigenvalues, failures
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.files import read_csv
from wellcond.experiments.results.columns import place_of, schema, types_of
from wellcond.experiments.run.result import CONDITION, RunResult
from wellcond.monitor import ConditionRecord

with needs_train_extra():
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

CONDITION_TABLE = "condition.parquet"
RECORDED = types_of(ConditionRecord)


def condition_rows(result: RunResult) -> list[dict[str, Any]]:
    """The records of a run, from ``condition.csv`` in its folder or from the table of its comparison."""
    folder = Path(result.folder)
    if (folder / CONDITION).exists():
        return list(read_csv(folder / CONDITION))
    path = folder.parents[1] / CONDITION_TABLE if len(folder.parents) > 1 else folder
    if not path.is_file():
        return []
    place = place_of(result, path.parent)
    rows = pq.ParquetFile(path).read().filter(pc.field("folder") == place).to_pylist()
    return [{name: row[name] for name in RECORDED if name in row} for row in rows]


def lack_rank(results: Iterable[RunResult]) -> bool:
    """Whether P of the first layer lacked full rank at most steps of every run: its median κ is infinite."""
    kappas = [result.conditions[0].kappa for result in results if result.conditions]
    return bool(kappas) and all(map(math.isinf, kappas))


def kappa_over_range(result: RunResult) -> float:
    """The condition number over the numerical range of P at the first layer, the median over the steps; nan without
    records."""
    layer = result.conditions[0].layer if result.conditions else None
    records = [row for row in condition_rows(result) if row["layer"] == layer and int(row["step"]) < result.steps]
    found = [float(row["kappa_range"]) for row in records if row.get("kappa_range") not in ("", None)]
    return statistics.median(found) if found else math.nan


def condition_table(result: RunResult, out: Path, label: str) -> Any:
    """The records of a run up to its last step, as a `pyarrow.Table`."""
    of_run = {"label": label, "seed": result.config.seed, "folder": place_of(result, out)}
    rows = []
    for found in condition_rows(result):
        row = {name: _value(found.get(name), kind) for name, kind in RECORDED.items()}
        if row["step"] < result.steps:  # later ones belong to the extended run
            rows.append({**of_run, **row})
    columns = {"label": pa.string(), "seed": pa.int64(), "folder": pa.string(), **RECORDED}
    return pa.Table.from_pylist(rows, schema=schema(columns))


def _value(found: Any, kind: Any) -> Any:
    """A cell of a column of this type, from text or a number."""
    if found in ("", None):
        return None
    if kind == pa.string():
        return str(found)
    number = float(found)
    return int(number) if kind == pa.int64() and math.isfinite(number) else number
