"""What the figures show: curves over training, the median over seeds and their range, in panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wellcond.experiments.files import read_csv
from wellcond.experiments.results.condition import condition_rows
from wellcond.experiments.run.result import CONDITION, METRICS, RunResult

Curve = tuple[list[int], list[float], list[float], list[float]]


def curve(runs: Sequence[RunResult], column: str) -> Curve:
    """Steps, median, minimum and maximum over `runs` of the first observed layer's `column`, where all recorded it.

    Infinite values stay infinite: matplotlib leaves a gap there.
    """
    layer = runs[0].conditions[0].layer
    return _over_seeds([table[table.layer == layer] for table in _tables(runs, CONDITION)], "step", column)


def _tables(runs: Sequence[RunResult], name: str) -> list[Any]:
    """A file of every run as a data frame, in which only `layer` is not a number.

    It ends with the result's last step or epoch: what comes after it is of the same run made longer.
    """
    import pandas as pd

    def number(text: str) -> float:
        return float("nan" if text == "" else text)  # pandas' own reader does not keep the last digit

    rows = (condition_rows(run) if name == CONDITION else read_csv(Path(run.folder) / name) for run in runs)
    frames = [pd.DataFrame(found) for found in rows]
    frames = [frame.apply(lambda column: column if column.name == "layer" else column.map(number)) for frame in frames]
    ends = [run.steps if name == CONDITION else run.config.epochs for run in runs]
    column = "step" if name == CONDITION else "epoch"
    return [frame[frame[column] < end] for frame, end in zip(frames, ends, strict=True)]


def _over_seeds(tables: Sequence[Any], x: str, y: str) -> Curve:
    import pandas as pd

    found: Any = pd.concat([table.set_index(table[x].astype(int))[y] for table in tables], axis=1, join="inner")
    middle, low, high = found.median(axis=1), found.min(axis=1), found.max(axis=1)
    return found.index.tolist(), middle.tolist(), low.tolist(), high.tolist()


class Panel(NamedTuple):
    """Curves by label under a heading; on a logarithmic axis or not."""

    heading: str
    curves: Mapping[str, Curve]
    log: bool = False


def condition_panels(runs: Mapping[str, Sequence[RunResult]], columns: Mapping[str, str]) -> list[Panel]:
    """For each of the ``columns`` of ``condition.csv``, with its heading, the first observed layer over the steps.

    ``runs`` has for each label its runs, one for each seed.
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


BOTH = {"kappa": "without ε:  κ(P)", "kappa_eps": "with ε:  κ(P + εI), what the solver sees"}
PAPERS = {"kappa": "condition number of the covariance"}
RANGE = {"kappa_range": "condition number over the numerical range of P; κ(P) is infinite, as P lacks full rank"}


def columns(results: Sequence[RunResult], papers: bool) -> dict[str, str]:
    """What to draw of these runs: the ``papers`` one panel, or both; where P never has full rank, what there is."""
    if all(math.isinf(result.conditions[0].kappa) for result in results):
        return RANGE
    return PAPERS if papers else BOTH


def learning_panels(runs: Mapping[str, Sequence[RunResult]]) -> list[Panel]:
    """Training loss and validation error (percent) over the epochs, of the runs whose folders are there.

    Those that were read from a table of results have none.
    """
    here = {name: [run for run in its if (Path(run.folder) / METRICS).exists()] for name, its in runs.items()}
    tables = {
        label: [t.assign(epoch=t.epoch + 1, val_error=100 * t.val_error) for t in _tables(results, METRICS)]
        for label, results in here.items()
        if results
    }
    headings = {"train_loss": "training loss", "val_error": "validation error, %"}
    return [
        Panel(heading, {label: _over_seeds(found, "epoch", column) for label, found in tables.items()})
        for column, heading in headings.items()
    ]
