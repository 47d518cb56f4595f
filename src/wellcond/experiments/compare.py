"""Comparing a grid of configurations × seeds: trains every run, then writes the table and the figure.

    OUT/config.json  results.csv  results.json  condition.png  condition.svg  runs/LABEL-seedN/…
    OUT/results.parquet  condition.parquet

`results.csv` is the table, one line per configuration and layer; `results.json` adds every run and its environment. The
Parquet files hold the runs finished so far, one row per run and one per record (see `results.parquet`). An interrupted
comparison can be resumed: finished runs are read back, unfinished ones continue. It can be extended in the same way, by
seeds, treatments, norms or heads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.files import write_csv, write_json
from wellcond.experiments.grid.attempt import Executor, in_this_process, same_images
from wellcond.experiments.grid.held import held_results, refuse_another_version, with_threads
from wellcond.experiments.grid.reuse import copy_runs, finished_in
from wellcond.experiments.grid.train_all import train_all
from wellcond.experiments.results.condition import CONDITION_TABLE
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.parquet import RESULTS_TABLE, ResultTables
from wellcond.experiments.results.summary import (
    COMPARISON,
    RUNS,
    as_columns,
    by_label,
    configs_in,
    run_folders,
    summarise,
)
from wellcond.experiments.run.build import build, load
from wellcond.experiments.run.checkpoints import DAMAGED
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig
from wellcond.experiments.run.parts import is_treatable
from wellcond.experiments.run.result import RunResult
from wellcond.experiments.run.run_folder import MADE as MADE_BY_RUN
from wellcond.experiments.show.curves import columns
from wellcond.experiments.show.figures import condition_figure, save_figure

log: logging.Logger = logging.getLogger("wellcond")

FIGURE = "condition"
MADE = (
    *(folders.CONFIG, "results.csv", "results.json", f"{FIGURE}.png", f"{FIGURE}.svg", ".*.part"),
    *(RESULTS_TABLE, CONDITION_TABLE, f"{RESULTS_TABLE}{DAMAGED}"),
    *(f"{RUNS}/*/{pattern}" for pattern in MADE_BY_RUN),
)


def compare(
    configs: Sequence[RunConfig],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    jobs: int | None = None,
    executor: str | None = None,
    reuse: Sequence[str | os.PathLike[str]] = (),
    experiment: Experiment | None = None,
    finished: Callable[[int, RunResult], None] = lambda index, result: None,
) -> list[Any]:
    """Run every configuration on the same data, write the table and the figure, and return the rows of the table.

    A failing run does not stop the others; its error is raised once they have finished.

    Args:
        resume: continue the comparison in ``out``; further configurations may be added.
        overwrite: delete the comparison in ``out`` (only its own files) and start over.
        progress: show a progress bar, unless several runs are trained at once.
        jobs: number of parallel runs, by default one, or the capacity of the cluster. Parallel runs have a process each
            and one CPU thread unless configured otherwise. With the same number of threads a run is bit for bit the
            same in either case.
        executor: None for this machine, ``ray``, or ``ray://HOST:PORT`` (`grid.ray_cluster`).
        reuse: other comparisons, of which finished runs with one of these configurations are copied.
        experiment: the names of the rows and their baselines; by default each configuration is a row.
        finished: called with the index and the result of every finished run, in the order of completion.

    Raises:
        ConfigError: no configurations, duplicates, different data, an invalid ``jobs``, or an unreachable cluster.
        RunError: ``out`` holds something else, another process uses it, or a run failed; finished runs remain.
        KeyboardInterrupt: Ctrl-C; the comparison can be resumed.
    """
    out = Path(out)
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    if len({same_images(config) for config in configs}) > 1:
        raise ConfigError("all runs of a comparison need the same data, image size and crop")
    parallel = parallel_executor(jobs, executor)
    marked = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    configs = with_threads(configs, configs_in(marked) if resume else [], apart=parallel is not None)
    experiment = experiment or Experiment.of_grid(configs)
    held = dict(zip(configs_in(marked), run_folders(marked), strict=True)) if resume else {}
    names = {
        config: held.get(config, experiment.folder(config)) for config in configs
    }  # rows may have been renamed since
    places = {config: out / RUNS / name for config, name in names.items()}
    if len(set(places.values())) < len(configs):
        raise ConfigError("two rows have names that differ only in punctuation and would share a folder")
    with folders.claimed(out, lambda: _check(out, configs, resume, overwrite, experiment)):
        done = held_results(out, places) if resume else {}
        found = finished_in([Path(other) for other in reuse], configs, done)
        if resume and len(done) < len(configs):
            refuse_another_version(out, marked.get("version"), list(done.values()))
        data = load(configs[0])
        rows = {experiment.label(config): config for config in configs}
        for config in rows.values():  # validate before writing anything
            build(config, data)
        version = marked.get("version") if resume else wellcond.__version__
        grid = {"version": version, "runs": [config.to_dict() for config in configs]}
        grid["experiment"] = experiment.to_dict(names)
        if resume:
            folders.mark(out, COMPARISON, grid)
        else:
            folders.prepare(out, COMPARISON, grid, MADE)
        done |= copy_runs(found, places)
        _warn_of_untreated(configs)
        tables = ResultTables(out, experiment.label, grid)
        results = train_all(places, tables, done, parallel or in_this_process(data, progress), finished)
        return _write(experiment, results, out)


def parallel_executor(jobs: int | None, executor: str | None) -> Executor | None:
    """The executor for several processes or a cluster; None for this process."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if executor is not None:
        if executor != "ray" and not executor.startswith("ray://"):
            raise ConfigError(f"executor must be ray or ray://HOST:PORT, got '{executor}'")
        from wellcond.experiments.grid.ray_cluster import on_ray

        return on_ray(executor, jobs)
    if jobs is None or jobs == 1:
        return None
    from wellcond.experiments.grid.processes import in_processes

    return in_processes(jobs)


def _warn_of_untreated(configs: Sequence[RunConfig]) -> None:
    names = dict.fromkeys(config.label for config in configs if not is_treatable(config.norm, config.head))
    if names and any(config.treat != NO_TREATMENT for config in configs):
        log.warning("%s: trained without a treatment, as there is no spectral layer to treat", ", ".join(names))


def _write(experiment: Experiment, results: Sequence[RunResult], out: Path) -> list[Any]:
    """Write the table and the figure; the rows of the table."""
    rows = summarise(results, experiment.label)
    configs = {label: its[0].config for label, its in by_label(results, experiment.label).items()}
    table = [as_columns(row, configs[row.label]) for row in rows]
    write_csv(out / "results.csv", list(table[0]), table)
    differences = [difference._asdict() for difference in experiment.differences(results)]
    runs = [asdict(result) for result in results]
    write_json(out / "results.json", {"rows": table, "differences": differences, "runs": runs})
    seeds = sorted({result.config.seed for result in results})
    band = f"median of {len(seeds)} seeds, band from minimum to maximum" if len(seeds) > 1 else f"seed {seeds[0]}"
    shown = columns(results, papers=experiment.shows == "figure")
    figure = condition_figure(by_label(results, experiment.label), f"{experiment.heading}: {band}", columns=shown)
    save_figure(figure, out / FIGURE)
    return rows


def _check(out: Path, configs: Sequence[RunConfig], resume: bool, overwrite: bool, experiment: Experiment) -> None:
    """Raise a `FolderError` if data would be lost, or if the folder holds runs that are not in `configs`."""
    marked = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    if not resume:
        return
    held = configs_in(marked)
    recipes = (Experiment.from_dict(marked.get("experiment"), held).recipe, experiment.recipe)
    if recipes[0] != recipes[1]:
        names = [f"recipe '{recipe}'" if recipe else "a grid without a recipe" for recipe in recipes]
        raise FolderError(f"'{out}' holds {names[0]}, but {names[1]} was given; choose another --out")
    if set(held) <= set(configs):
        return
    axes = {name: getattr(held[0], name) for name in ("norm", "head", "treat", "seed")}
    folders.refuse_conflicts(held[0].to_dict(), replace(configs[0], **axes).to_dict(), out)
    labels = ", ".join(dict.fromkeys(config.label for config in held))
    seeds = len({config.seed for config in held})
    raise FolderError(
        f"cannot resume '{out}' without all of its runs: it holds {labels} with {seeds} seeds on {held[0].data}; "
        "leave options out, name these runs too, or choose another --out"
    )
