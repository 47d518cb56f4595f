"""A grid of configurations × seeds: every run trained once, one by one or several at once, then table and figure.

    OUT/config.json  results.csv  results.json  condition.png  condition.svg  runs/LABEL-seedN/…
    OUT/results.parquet  condition.parquet

`results.csv` is the table, one line a configuration and layer; `results.json` has it with every run and the machine.
The two Parquet files have what has finished so far, a row a run and a row a record (`results.parquet`).
An interrupted comparison goes on where it was: finished runs are read back, those under way are resumed. It grows in
the same way, by seeds, treatments, norms or heads.
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
from wellcond.experiments.grid.attempt import Executor, here, same_images
from wellcond.experiments.grid.held import held_results, refuse_another_version, with_threads
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
from wellcond.experiments.run.train import MADE as MADE_BY_RUN
from wellcond.experiments.show.curves import columns
from wellcond.experiments.show.figures import condition_figure, save_figure

log = logging.getLogger("wellcond")

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
    experiment: Experiment | None = None,
    finished: Callable[[int, RunResult], None] = lambda index, result: None,
) -> list[Any]:
    """Run every configuration, all on the same data, and write table and figure; the rows of the table.

    A run that fails does not keep the others from being trained; what went wrong is raised when they have ended.

    Args:
        resume: go on with what ``out`` holds; the configurations may be more than that.
        overwrite, progress: as in `run`; there is no progress bar where several are trained at once.
        jobs: how many runs are trained at once, by default one, on a cluster as many as it has room for. Several are
            each in a process of its own, on one CPU thread where the configuration does not say another number. A run
            has the same bits whichever way it is trained with that number of threads.
        executor: None, this machine; or ``ray``, or ``ray://HOST:PORT`` (`grid.ray_cluster`).
        experiment: the names of the rows, and what they are compared with; by default each configuration is a row.
        finished: called with the index and the result of every run that is done, in the order in which they end.

    Raises:
        ConfigError: no configuration, the same twice, different data, no job, or a cluster that does not answer.
        RunError, ValueError, KeyboardInterrupt: as `run`; finished runs remain.
    """
    out = Path(out)
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    if len({same_images(config) for config in configs}) > 1:
        raise ConfigError("a comparison is on one data set, and its images are brought to one size by one kind of crop")
    elsewhere = _elsewhere(jobs, executor)
    marked = _marked(out, resume, overwrite)
    configs = with_threads(configs, configs_in(marked) if resume else [], apart=elsewhere is not None)
    experiment = experiment or Experiment.of_grid(configs)
    held = dict(zip(configs_in(marked), run_folders(marked), strict=True)) if resume else {}
    names = {config: held.get(config, experiment.folder(config)) for config in configs}  # a row may be renamed
    places = {config: out / RUNS / name for config, name in names.items()}
    if len(set(places.values())) < len(configs):
        raise ConfigError("two rows have names that differ in signs alone, and would share a folder")
    with folders.claimed(out, lambda: _check(out, configs, resume, overwrite, experiment)):
        done = held_results(out, places) if resume else {}
        if resume and len(done) < len(configs):
            refuse_another_version(out, marked.get("version"), list(done.values()))
        data = load(configs[0])
        rows = {experiment.label(config): config for config in configs}
        for config in rows.values():  # find what is wrong before writing
            build(config, data)
        version = marked.get("version") if resume else wellcond.__version__
        grid = {"version": version, "runs": [config.to_dict() for config in configs]}
        grid["experiment"] = experiment.to_dict(names)
        if resume:
            folders.mark(out, COMPARISON, grid)
        else:
            folders.prepare(out, COMPARISON, grid, MADE)
        _say_what_stays_untreated(configs)
        tables = ResultTables(out, experiment.label)
        results = train_all(places, tables, done, elsewhere or here(data, progress), finished)
        return _write(experiment, results, out)


def _elsewhere(jobs: int | None, executor: str | None) -> Executor | None:
    """What trains the runs in other processes, if anything does."""
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


def _say_what_stays_untreated(configs: Sequence[RunConfig]) -> None:
    names = dict.fromkeys(config.label for config in configs if not is_treatable(config.norm, config.head))
    if names and any(config.treat != NO_TREATMENT for config in configs):
        log.warning("%s: trained without a treatment, as there is no spectral layer to treat", ", ".join(names))


def _write(experiment: Experiment, results: Sequence[RunResult], out: Path) -> list[Any]:
    """The table and the figure; the rows of the table."""
    rows = summarise(results, experiment.label)
    configs = {label: its[0].config for label, its in by_label(results, experiment.label).items()}
    table = [as_columns(row, configs[row.label]) for row in rows]
    write_csv(out / "results.csv", list(table[0]), table)
    found = [one._asdict() for one in experiment.differences(results)]
    write_json(
        out / "results.json", {"rows": table, "differences": found, "runs": [asdict(result) for result in results]}
    )
    seeds = sorted({result.config.seed for result in results})
    band = f"median of {len(seeds)} seeds, band from minimum to maximum" if len(seeds) > 1 else f"seed {seeds[0]}"
    shown = columns(results, papers=experiment.shows == "figure")
    figure = condition_figure(by_label(results, experiment.label), f"{experiment.heading}: {band}", columns=shown)
    save_figure(figure, out / FIGURE)
    return rows


def _marked(out: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    """What the folder says that it holds; a `FolderError` where something would be lost."""
    return folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)


def _check(out: Path, configs: Sequence[RunConfig], resume: bool, overwrite: bool, experiment: Experiment) -> None:
    """Refuse a folder in which something would be lost, or that holds what is not among `configs`."""
    marked = _marked(out, resume, overwrite)
    if not resume:
        return
    held = configs_in(marked)
    its = Experiment.from_dict(marked.get("experiment"), held)
    if its.recipe != experiment.recipe:
        names = [f"recipe '{one}'" if one else "a grid without a recipe" for one in (its.recipe, experiment.recipe)]
        raise FolderError(f"'{out}' holds {names[0]}, and {names[1]} was asked; choose another --out")
    if set(held) <= set(configs):
        return
    axes = {name: getattr(held[0], name) for name in ("norm", "head", "treat", "seed")}
    folders.refuse_conflicts(held[0].to_dict(), replace(configs[0], **axes).to_dict(), out)
    labels = ", ".join(dict.fromkeys(config.label for config in held))
    seeds = len({config.seed for config in held})
    raise FolderError(
        f"cannot resume '{out}' without all of its runs: it holds {labels} with {seeds} seeds on {held[0].data}; "
        "leave options out, or name those too beside what comes in addition, or choose another --out"
    )
