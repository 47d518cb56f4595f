"""What a run and a comparison found: `result.json` of one run, and the table over seeds, as the paper's.

Errors and accuracies are fractions in the files and percent in the printed tables. The spread over seeds is
the sample standard deviation (divisor n − 1), undefined (`nan`) for one seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import RunError
from wellcond.experiments.files import read_csv, write_json
from wellcond.experiments.machine import versions
from wellcond.experiments.recipes import RunConfig

RESULT, CONDITION, METRICS = "result.json", "condition.csv", "metrics.csv"


@dataclass(frozen=True)
class LayerCondition:
    """The conditioning of one layer's input covariance over one run; medians are over the recorded steps.

    Attributes:
        layer: its name in the model.
        kappa: median κ(P), without ε.
        kappa_eps: median κ(P + εI), what the solver sees.
        numerical_rank, dim: median numerical rank of P and its size.
        effective_rank: median (tr P)² / tr P².
        failures: decompositions that failed at first, over the whole run.
        records: how many measurements the medians are over.
    """

    layer: str
    kappa: float
    kappa_eps: float
    numerical_rank: float
    dim: int
    effective_rank: float
    failures: int
    records: int


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        config: what was run.
        folder: where.
        test_error, test_accuracy, test_loss: on the test images, seen once, with the last epoch's weights.
        best_val_accuracy, best_epoch: of `best.ckpt`, on the validation images; epochs count from 0.
        steps: optimizer steps in all.
        seconds: training time, summed over the sessions of a resumed run.
        seconds_per_step: median over steps (of which only every `monitor_every`-th measures κ).
        conditions: one entry for each observed layer.
        environment: versions and machine.
    """

    config: RunConfig
    folder: str
    test_error: float
    test_accuracy: float
    test_loss: float
    best_val_accuracy: float
    best_epoch: int
    steps: int
    seconds: float
    seconds_per_step: float
    conditions: tuple[LayerCondition, ...]
    environment: dict[str, str]

    def save(self) -> None:
        """Write `result.json` into the run's folder, which marks the run as finished."""
        values = asdict(self)
        del values["folder"]  # a run may be moved
        write_json(Path(self.folder) / RESULT, values)


def load_result(folder: Path) -> RunResult | None:
    """The result of a finished run, or None if it has not finished.

    Raises:
        RunError: `result.json` is there and is not a run's.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        values["config"] = RunConfig.from_dict(values["config"])
        values["conditions"] = tuple(LayerCondition(**_floats(LayerCondition, c)) for c in values["conditions"])
        return RunResult(folder=str(folder), **_floats(RunResult, values))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{path}' is not the result of a run ({error}); delete it and use --resume") from error


def _floats(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `write_json` in the float fields of a dataclass: the strings `inf` and `nan` are numbers again."""
    numbers = {field.name for field in fields(kind) if field.type == "float"}
    return {name: float(value) if name in numbers else value for name, value in values.items()}


def layer_conditions(path: Path, failures: Mapping[str, int]) -> tuple[LayerCondition, ...]:
    """Medians of a run's `condition.csv`, layer by layer, in the order in which the layers appear.

    `failures` has the failed decompositions of each spectral layer over the whole run: the last of them may
    have come after the last record.
    """
    by_layer: dict[str, list[dict[str, str]]] = {}
    for row in read_csv(path):
        by_layer.setdefault(row["layer"], []).append(row)

    def median(rows: list[dict[str, str]], column: str) -> float:
        return statistics.median(float(row[column]) for row in rows)

    return tuple(
        LayerCondition(
            layer=layer,
            kappa=median(rows, "kappa"),
            kappa_eps=median(rows, "kappa_eps"),
            numerical_rank=median(rows, "numerical_rank"),
            dim=int(rows[-1]["dim"]),
            effective_rank=median(rows, "effective_rank"),
            failures=failures.get(layer, 0),
            records=len(rows),
        )
        for layer, rows in by_layer.items()
    )


def environment(device: str) -> dict[str, str]:
    """Versions and machine, for `result.json`."""
    import lightning

    return {**versions(), "lightning": lightning.__version__, "device": device}


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a configuration and one of its observed layers, over seeds.

    κ and ranks are medians over the seeds of each run's median; failures are summed; `seconds_per_step` is
    the median.
    """

    label: str
    layer: str
    seeds: int
    test_error_mean: float
    test_error_std: float
    test_error_min: float
    kappa: float
    kappa_eps: float
    numerical_rank: float
    dim: int
    effective_rank: float
    failures: int
    seconds_per_step: float


def summarise(
    results: Iterable[RunResult], label: Callable[[RunConfig], str] = lambda config: config.label
) -> list[Row]:
    """The table: one row for each configuration (what has one ``label``) and layer, in the order in which they come."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(label(result.config), []).append(result)
    return [row for label, runs in groups.items() for row in _rows(label, runs)]


def _rows(label: str, runs: Sequence[RunResult]) -> Iterable[Row]:
    errors = [run.test_error for run in runs]
    for index, first in enumerate(runs[0].conditions):
        layers = [run.conditions[index] for run in runs]
        yield Row(
            label=label,
            layer=first.layer,
            seeds=len(runs),
            test_error_mean=statistics.fmean(errors),
            test_error_std=statistics.stdev(errors) if len(errors) > 1 else math.nan,
            test_error_min=min(errors),
            kappa=statistics.median(layer.kappa for layer in layers),
            kappa_eps=statistics.median(layer.kappa_eps for layer in layers),
            numerical_rank=statistics.median(layer.numerical_rank for layer in layers),
            dim=first.dim,
            effective_rank=statistics.median(layer.effective_rank for layer in layers),
            failures=sum(layer.failures for layer in layers),
            seconds_per_step=statistics.median(run.seconds_per_step for run in runs),
        )
