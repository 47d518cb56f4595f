"""Collecting finished runs from folders, and the paper's table over their seeds.

The spread over seeds is the sample standard deviation (divisor n − 1), `nan` for one seed.
"""

from __future__ import annotations

import math
import operator
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.results.parquet import RESULTS_TABLE, read_results
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult, load_result, newest_earlier_result
from wellcond.experiments.run.run_folder import KIND as RUN

COMPARISON, RUNS = "comparison", "runs"
"""The kind of a comparison's folder, and the subfolder of its runs."""


Label = Callable[[RunConfig], str]
SHORT: Label = operator.attrgetter("label")


def summarise(results: Iterable[RunResult], label: Label = SHORT) -> list[Any]:
    """The table: a named tuple for each ``label`` and layer, in the order of `results`.

    κ and ranks are medians over seeds of each run's median.
    """
    import pandas as pd

    layers = pd.DataFrame(
        {
            "label": label(run.config),
            "error": run.test_error,
            "top5": math.nan if run.test_top5_error is None else run.test_top5_error,
            "seconds": run.seconds_per_step,
            **asdict(layer),
        }
        for run in results
        for layer in run.conditions
    )
    table = layers.groupby(["label", "layer"], sort=False).agg(
        seeds=("error", "size"),
        test_error_mean=("error", "mean"),
        test_error_std=("error", "std"),
        test_error_min=("error", "min"),
        test_top5_error_mean=("top5", "mean"),
        kappa=("kappa", "median"),
        kappa_eps=("kappa_eps", "median"),
        numerical_rank=("numerical_rank", "median"),
        dim=("dim", "first"),
        effective_rank=("effective_rank", "median"),
        failures=("failures", "sum"),
        seconds_per_step=("seconds", "median"),
    )
    return list(table.reset_index().itertuples(index=False, name="Row"))


def as_columns(row: Any, config: RunConfig) -> dict[str, Any]:
    """A row of the table for a file, with its data, model and epochs, and units in the names.

    The last three columns are fractions, kept for compatibility.
    """
    values = row._asdict()
    fractions = {name: values.pop(name) for name in ("test_error_mean", "test_error_std", "test_error_min")}
    top5 = values.pop("test_top5_error_mean")
    percents = {name.replace("error", "error_percent"): 100 * value for name, value in fractions.items()}
    first = {name: getattr(config, name) for name in ("data", "model", "epochs")}
    first |= {name: values.pop(name) for name in ("label", "layer", "seeds")}
    return first | percents | {"test_top5_error_percent_mean": 100 * top5} | values | fractions


def by_label(results: Iterable[RunResult], label: Label = SHORT) -> dict[str, list[RunResult]]:
    """The runs grouped by label."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(label(result.config), []).append(result)
    return groups


def labels(configs: Sequence[RunConfig]) -> Label:
    """A labelling function: the short label, followed by other options in which these configurations differ, but for
    the number of CPU threads."""
    aside = {"norm", "head", "solver", "treat", "seed", "threads"}  # in the label, or of no interest
    names = [field.name for field in fields(RunConfig) if field.name not in aside]
    varying = [name for name in names if len({getattr(config, name) for config in configs}) > 1]

    def label(config: RunConfig) -> str:
        return ", ".join([config.label, *(f"{name} {getattr(config, name)}" for name in varying)])

    return label


def configs_in(comparison: Mapping[str, Any]) -> list[RunConfig]:
    """The grid in the `config.json` of a comparison; a `FolderError` if this version cannot read it."""
    try:
        return [RunConfig.from_dict(values) for values in comparison["runs"]]
    except (KeyError, TypeError, ValueError) as error:
        made_by = f" of wellcond {comparison['version']}" if comparison.get("version") else ""
        raise FolderError(
            f"this is not a comparison{made_by} that wellcond {wellcond.__version__} can go on with ({error}): "
            "use the version that began it, or choose another --out"
        ) from error


def run_folders(comparison: Mapping[str, Any]) -> list[str]:
    """The names of the runs' folders, in the order of the runs."""
    saved = (comparison.get("experiment") or {}).get("folders")
    return saved or [config.folder_name for config in configs_in(comparison)]


def collect(places: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """The results of all finished runs in these folders or tables (``results.parquet``), and notes on what is left out:
    unfinished runs, and further runs of the same configuration regardless of CPU threads, such as copies.

    A run that is being extended is represented by its earlier result.
    """
    places = list(places)
    found = dict.fromkeys(path.resolve() for place in places for path in _runs_in(place))
    in_tables, notes = _in_tables(places)
    results = []
    here = Path.cwd()
    for path in found:
        folder = path.relative_to(here) if path.is_relative_to(here) else path
        if (result := load_result(folder)) is not None:
            results.append(result)
        elif (result := newest_earlier_result(folder)) is not None:
            results.append(result)
            epochs = f"{result.config.epochs} epoch{'s' if result.config.epochs > 1 else ''}"
            notes.append(
                f"'{folder}' is being extended and not finished: reported is its result after {epochs}; "
                f"go on with: {_resume_command(folder)}"
            )
        elif path in in_tables:  # its folder is gone
            results.append(replace(in_tables[path], folder=str(folder)))
        else:
            notes.append(f"'{folder}' is not finished and left out; go on with: {_resume_command(folder)}")
    if not results:
        raise RunError("; ".join(["there is no finished run to report", *notes]))
    results, copies = _one_of_each(results)
    return results, notes + copies


def _one_of_each(results: Iterable[RunResult]) -> tuple[list[RunResult], list[str]]:
    """The first run of each configuration regardless of CPU threads, and a note on the others if there are any."""
    kept: dict[RunConfig, RunResult] = {}
    others = []
    for result in results:
        first = kept.setdefault(replace(result.config, threads=None), result)
        if first is not result:
            threads = "" if first.config == result.config else ", but for its threads"
            others.append(f"'{result.folder}' (as '{first.folder}'{threads})")
    notes = [f"left out, as a run of the same configuration is reported: {', '.join(others)}"] if others else []
    return list(kept.values()), notes


def _resume_command(run: Path) -> str:
    if folders.kind_of(run) == RUN:
        return shlex.join(["wellcond", "train", "--out", str(run), "--resume"])
    return shlex.join(["wellcond", "compare", "--out", str(run.parents[1]), "--resume"])  # the run has not started yet


def _in_tables(places: Iterable[Path]) -> tuple[dict[Path, RunResult], list[str]]:
    """By folder: the results in Parquet files or in those of comparisons; and a note on each unreadable table."""
    found: dict[Path, RunResult] = {}
    notes = []
    for place in places:
        table = place if place.suffix == ".parquet" else place / RESULTS_TABLE
        try:
            results = read_results(table) if table.is_file() else []
        except RunError as error:
            notes.append(f"{error}; reported are the runs whose folders are there")
        else:
            found |= {Path(result.folder).resolve(): result for result in results}
    return found, notes


def _runs_in(place: Path) -> list[Path]:
    if place.suffix == ".parquet":
        return [Path(result.folder) for result in read_results(place)]
    kind = folders.kind_of(place)
    if kind == RUN:
        return [place]
    if kind == COMPARISON:
        comparison = folders.read_config(place, COMPARISON)
        return [place / RUNS / name for name in run_folders(comparison)]
    inside = sorted(p for p in place.glob("*") if folders.kind_of(p) in (RUN, COMPARISON)) if kind is None else []
    if not inside:
        raise FolderError(f"'{place}' holds no run; give the folder of a run or a comparison")
    return [path for p in inside for path in _runs_in(p)]
