"""Finished runs as two Apache Parquet tables, for pandas, polars, DuckDB and others.

    OUT/results.parquet      one row per run: label, folder, options, versions, machine, errors, times, conditioning
    OUT/condition.parquet    one row per run, layer and recorded step: κ, ranks, extreme eigenvalues, failures

Units are in the column names (``_percent``, ``_fraction``, ``_seconds``) and in the metadata of the fields (``unit``).
The conditioning of the first observed layer has its own columns; that of all layers is in the list ``layers``. All
digits are kept, so that `read_results` restores the results from the file alone. The metadata of the first table has
the comparison's ``config.json``, with the rows and baselines of a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import RunError, needs_train_extra
from wellcond.experiments.results.columns import place_of, schema, types_of, write_table
from wellcond.experiments.results.condition import CONDITION_TABLE, condition_table
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import LayerCondition, RunResult

with needs_train_extra():
    import pyarrow as pa
    import pyarrow.parquet as pq

RESULTS_TABLE = "results.parquet"
COMPARED = b"wellcond.comparison"
"""The key of the metadata."""
ENVIRONMENT = "environment_"
COUNTS = ("threads", "cores")  # integers in the environment
RENAMED = {"seconds": "training_seconds"}


OPTIONS = types_of(RunConfig)
MEASURED = types_of(RunResult, ("config", "folder", "conditions", "environment"))
OF_A_LAYER = types_of(LayerCondition)


def _column(name: str) -> str:
    """The column of a field of `RunResult`."""
    return f"{name}_fraction" if name.endswith(("_error", "_accuracy")) else RENAMED.get(name, name)


def _percents(result: RunResult) -> dict[str, float]:
    """All errors in percent: of the test, and of the best epoch on the validation images."""
    found: dict[str, float] = {}
    for name in MEASURED:
        value = getattr(result, name)
        if value is not None and name.endswith("_error"):
            found[f"{name}_percent"] = 100 * value
        elif value is not None and name.endswith("_accuracy"):
            found.setdefault(f"{name.removesuffix('accuracy')}error_percent", 100 * (1 - value))
    return found


def results_table(results: Sequence[RunResult], out: Path, label: Callable[[RunConfig], str]) -> Any:
    """One row per run, as a `pyarrow.Table`."""
    percents = [_percents(result) for result in results]
    names = list(dict.fromkeys(name for result in results for name in result.environment))
    columns: dict[str, Any] = {"label": pa.string(), "folder": pa.string(), **OPTIONS}
    columns |= {f"{ENVIRONMENT}{name}": pa.int64() if name in COUNTS else pa.string() for name in names}
    columns |= {name: pa.float64() for found in percents for name in found}
    columns |= {_column(name): kind for name, kind in MEASURED.items()}
    columns |= {**OF_A_LAYER, "layers": pa.list_(pa.struct(list(OF_A_LAYER.items())))}

    def row(result: RunResult, percent: Mapping[str, float]) -> dict[str, Any]:
        layers = [asdict(condition) for condition in result.conditions]
        first_layer = layers[0] if layers else {}
        machine = {
            f"{ENVIRONMENT}{name}": int(value) if name in COUNTS else value
            for name, value in result.environment.items()
        }
        measured = {_column(name): getattr(result, name) for name in MEASURED}
        where = {"label": label(result.config), "folder": place_of(result, out)}
        return {**where, **result.config.to_dict(), **machine, **percent, **measured, **first_layer, "layers": layers}

    rows = [row(result, percent) for result, percent in zip(results, percents, strict=True)]
    return pa.Table.from_pylist(rows, schema=schema(columns))


def read_results(path: Path) -> list[RunResult]:
    """The results in a ``results.parquet``, given as a file or its folder; no other file is read.

    Raises:
        RunError: the file cannot be read, or is not a table of results.
    """
    path = path / RESULTS_TABLE if path.is_dir() else path
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
        return [_result(row, path.parent) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:  # Arrow raises subclasses of ValueError
        why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
        raise RunError(f"'{path}' is not a table of results that can be read: {why}") from error


def read_comparison(path: Path) -> dict[str, Any] | None:
    """The ``config.json`` of the comparison in the metadata of a ``results.parquet``; None in files of older versions.

    Raises:
        RunError: the file cannot be read, or the metadata is not JSON.
    """
    try:
        kept = (pq.read_schema(path).metadata or {}).get(COMPARED)
        return None if kept is None else json.loads(kept)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RunError(f"'{path}' is not a table of results that can be read: {why}") from error


def _result(row: Mapping[str, Any], out: Path) -> RunResult:
    folder = str(out / row["folder"])  # first, as every table of ours has it
    environment = {
        name.removeprefix(ENVIRONMENT): str(value)
        for name, value in row.items()
        if name.startswith(ENVIRONMENT) and value is not None
    }
    return RunResult(
        config=RunConfig.from_dict({name: row[name] for name in OPTIONS if name in row}),
        folder=folder,
        conditions=tuple(LayerCondition(**layer) for layer in row["layers"]),
        environment=environment,
        **{name: row[_column(name)] for name in MEASURED if _column(name) in row},
    )


class ResultTables:
    """The two tables of a comparison in ``out``, rewritten after every run; the records of a run are read once."""

    out: Path
    label: Callable[[RunConfig], str]

    def __init__(
        self, out: Path, label: Callable[[RunConfig], str], comparison: Mapping[str, Any] | None = None
    ) -> None:
        self.out, self.label, self._conditions = out, label, dict[str, Any]()
        self._metadata = {} if comparison is None else {COMPARED: json.dumps(comparison)}

    def write(self, results: Iterable[RunResult]) -> None:
        """Write both, each atomically."""
        results = list(results)
        for result in results:
            if result.folder not in self._conditions:
                self._conditions[result.folder] = condition_table(result, self.out, self.label(result.config))
        if results:
            recorded = pa.concat_tables([self._conditions[result.folder] for result in results])
            write_table(self.out / CONDITION_TABLE, recorded)  # first, so that runs in the other table have records
            table = results_table(results, self.out, self.label).replace_schema_metadata(self._metadata)
            write_table(self.out / RESULTS_TABLE, table)
