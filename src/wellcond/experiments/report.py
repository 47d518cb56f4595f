"""The report of runs: one page of HTML that needs nothing else, and its figures as files.

    OUT/config.json  report.html  condition.png  condition.svg  learning.png  learning.svg

It is made from what the runs left in their folders, and can be made again at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from wellcond.experiments import _page, folders
from wellcond.experiments.compare import KIND as COMPARISON
from wellcond.experiments.compare import RUNS, held_configs
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.figures import condition_figure, learning_figure, save_figure
from wellcond.experiments.files import write_atomically
from wellcond.experiments.recipes import RunConfig
from wellcond.experiments.results import RunResult, load_result, summarise
from wellcond.experiments.runs import KIND as RUN

KIND = "report"
PAGE = "report.html"
FIGURES = ("condition", "learning")
MADE = (folders.CONFIG, PAGE, *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")))


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """Write the report of finished runs.

    Args:
        runs: folders of runs or comparisons, or folders that hold such.
        out: the report's folder; an earlier report there is replaced, anything else refused.

    Returns:
        The page, and what was left out and why, a line each (which the page says too).

    Raises:
        RunError: a folder holds no run, none of the runs is finished, or ``out`` holds something else.
    """
    out = Path(out)
    results, notes = collect([Path(run) for run in runs])
    folders.check(out, KIND, resume=False, overwrite=folders.is_occupied(out))
    label = labels([result.config for result in results])
    rows = summarise(results, label)
    of = {row.label: [Path(r.folder) for r in results if label(r.config) == row.label] for row in rows}
    layers = {row.label: row.layer for row in reversed(rows)}  # the first of each configuration
    folders.prepare(out, KIND, {"runs": [result.folder for result in results]}, MADE)
    seeds = len({result.config.seed for result in results})
    band = f"median of {seeds} seeds, band from least to greatest" if seeds > 1 else "one seed"
    pictures = {
        "condition": condition_figure(of, layers, f"condition number of the covariance: {band}"),
        "learning": learning_figure(of, f"training: {band}"),
    }
    saved = {name: save_figure(pictures[name], out / name)[1] for name in FIGURES}
    page = _page.page(results, rows, label, notes, saved)
    write_atomically(out / PAGE, page.encode())
    return out / PAGE, notes


def collect(places: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """The results of all finished runs in the folders, each once, and a line for each that is not finished.

    Raises:
        RunError: a folder without a run, or no finished run at all.
    """
    found = dict.fromkeys(path.resolve() for place in places for path in _runs_in(place))
    results, notes = [], []
    here = Path.cwd()
    for path in found:
        folder = path.relative_to(here) if path.is_relative_to(here) else path
        if (result := load_result(folder)) is not None:
            results.append(result)
        else:
            notes.append(f"'{folder}' is not finished and left out; go on with: {_how_to_go_on(folder)}")
    if not results:
        raise RunError("; ".join(["there is no finished run to report", *notes]))
    return results, notes


def _how_to_go_on(run: Path) -> str:
    if folders.kind_of(run) == RUN:
        return f"wellcond train --out {run} --resume"
    return f"wellcond compare --out {run.parents[1]} --resume"  # which has not begun it yet


def _runs_in(place: Path) -> list[Path]:
    kind = folders.kind_of(place)
    if kind == RUN:
        return [place]
    if kind == COMPARISON:
        return [place / RUNS / config.folder_name for config in held_configs(place)]
    inside = sorted(p for p in place.glob("*") if folders.kind_of(p) in (RUN, COMPARISON)) if kind is None else []
    if not inside:
        raise FolderError(f"'{place}' holds no run; give the folder of a run or a comparison")
    return [path for p in inside for path in _runs_in(p)]


def labels(configs: Sequence[RunConfig]) -> Callable[[RunConfig], str]:
    """A name for each configuration whatever its seed: the short one, and what else tells these apart."""
    named = {"norm", "head", "treat", "seed"}
    names = [field.name for field in fields(RunConfig) if field.name not in named]
    varying = [name for name in names if len({getattr(config, name) for config in configs}) > 1]

    def label(config: RunConfig) -> str:
        return ", ".join([config.label, *(f"{name} {getattr(config, name)}" for name in varying)])

    return label
