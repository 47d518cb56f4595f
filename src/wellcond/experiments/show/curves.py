"""The data of the figures: curves over training, as median and range over seeds, in panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wellcond.experiments.files import read_csv
from wellcond.experiments.results.condition import condition_rows, lack_rank
from wellcond.experiments.run.result import CONDITION, METRICS, RunResult

Curve = tuple[list[int], list[float], list[float], list[float]]


def curve(runs: Sequence[RunResult], column: str) -> Curve:
    """Steps, and median, minimum and maximum over `runs` of the first layer's `column` at the steps common to all.

    Infinite values remain, and leave a gap in the plot.
    """
    layer = runs[0].conditions[0].layer
    return _over_seeds([table[table.layer == layer] for table in _tables(runs, CONDITION)], "step", column)


def _tables(runs: Sequence[RunResult], name: str) -> list[Any]:
    """A file of every run as a data frame; all columns but `layer` are numbers.

    It ends with the result's last step or epoch; later rows belong to the extended run.
    """
    import pandas as pd

    def number(text: str) -> float:
        return float("nan" if text == "" else text)  # pandas' parser loses the last digit

    tables = []
    for run in runs:
        frame = pd.DataFrame(condition_rows(run) if name == CONDITION else read_csv(Path(run.folder) / name))
        frame = frame.apply(lambda column: column if column.name == "layer" else column.map(number))
        in_result = frame["step"] < run.steps if name == CONDITION else frame["epoch"] < run.config.epochs
        tables.append(frame[in_result])
    return tables


def _over_seeds(tables: Sequence[Any], x: str, y: str) -> Curve:
    import pandas as pd

    found: Any = pd.concat([table.set_index(table[x].astype(int))[y] for table in tables], axis=1, join="inner")
    middle, low, high = found.median(axis=1), found.min(axis=1), found.max(axis=1)
    return found.index.tolist(), middle.tolist(), low.tolist(), high.tolist()


class Panel(NamedTuple):
    """A panel of a figure: curves by label, on a logarithmic axis if ``log``."""

    heading: str
    curves: Mapping[str, Curve]
    log: bool = False


def condition_panels(runs: Mapping[str, Sequence[RunResult]], columns: Mapping[str, str]) -> list[Panel]:
    """One panel per column of ``condition.csv`` in ``columns`` (with its heading), for the first layer over the steps.

    ``runs`` has the runs of all seeds by label.
    """
    panels = []
    for column, heading in columns.items():
        curves = {}
        for label, results in runs.items():
            found = curve(results, column)
            gaps = sum(math.isinf(value) for value in found[1])
            curves[label if not gaps else f"{label} (κ(P) infinite at {gaps} of {len(found[1])})"] = found
        panels.append(Panel(heading, curves, log=True))
    return panels


BOTH = {"kappa": "without ε:  κ(P)", "kappa_eps": "with ε:  κ(P + εI), as seen by the solver"}
PAPERS = {"kappa": "condition number of the covariance"}
RANGE = {"kappa_range": "condition number over the numerical range of P; κ(P) is infinite, as P lacks full rank"}


def columns(results: Sequence[RunResult], papers: bool) -> dict[str, str]:
    """The columns to plot: the ``papers`` panel, or both; κ over the numerical range if P never has full rank."""
    if lack_rank(results):
        return RANGE
    return PAPERS if papers else BOTH


def learning_panels(runs: Mapping[str, Sequence[RunResult]]) -> list[Panel]:
    """Training loss and validation error (percent) over the epochs, for runs whose folders still exist."""
    tables = {}
    for label, results in runs.items():
        if available := [run for run in results if (Path(run.folder) / METRICS).exists()]:
            frames = _tables(available, METRICS)
            tables[label] = [t.assign(epoch=t.epoch + 1, val_error=100 * t.val_error) for t in frames]
    headings = {"train_loss": "training loss", "val_error": "validation error, %"}
    return [
        Panel(heading, {label: _over_seeds(found, "epoch", column) for label, found in tables.items()})
        for column, heading in headings.items()
    ]
