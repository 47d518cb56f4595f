"""Carrying out a grid of runs of any kind: what is checked before anything is written, what is there, and training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.grid.attempt import Executor, Work, in_this_process
from wellcond.experiments.grid.held import (
    held_runs,
    open_threads,
    refuse_another_version,
    refuse_missing,
    with_threads,
)
from wellcond.experiments.grid.reuse import copy_runs, finished_in, refuse_own
from wellcond.experiments.grid.train_all import Tables, train_all
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.summary import RUNS

OF_IMAGES = ("data", "image_size", "limit", "crop")
"""The options that the images of a run depend on, of any kind of run."""


@dataclass(frozen=True)
class Comparison:
    """How comparisons of one kind are kept.

    ``kind`` is that of the folder, ``made`` the patterns of its files, and ``config`` the class of configurations.
    ``finished(out, places)`` are the results that are there; ``tables(out, experiment, saved)`` writes those of the
    runs as they finish, beside the saved ``config.json``; ``conclude(out, experiment, results)`` is called with all of
    them, and what it returns is what the comparison returns.
    """

    kind: str
    made: tuple[str, ...]
    config: Any
    work: Work
    finished: Callable[[Path, Mapping[Any, Path]], dict[Any, Any]]
    tables: Callable[[Path, Experiment, Mapping[str, Any]], Tables]
    conclude: Callable[[Path, Experiment, Sequence[Any]], Any]


def carry_out(
    comparison: Comparison,
    configs: Sequence[Any],
    out: str | os.PathLike[str],
    experiment: Experiment | None,
    *,
    resume: bool,
    overwrite: bool,
    progress: bool,
    jobs: int | None,
    executor: str | None,
    finished: Callable[[int, Any], None],
    reuse: Sequence[str | os.PathLike[str]] = (),
) -> Any:
    """Train what is missing of a grid. Every error in the arguments raises before anything is written or deleted.

    The arguments are those of `compare`, for both kinds of runs.
    """
    out, work, others = Path(out), comparison.work, [Path(other) for other in reuse]
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    parallel = _parallel(jobs, executor)
    marked = folders.check(out, comparison.kind, resume=resume, overwrite=overwrite)
    held = held_runs(marked, comparison.config) if resume else {}
    configs = with_threads(configs, list(held), apart=parallel is not None)
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    _refuse_other_images(configs, work)
    experiment = experiment or Experiment.of_grid(configs)
    names = {config: held.get(config) or experiment.folder(config) for config in configs}  # rows may have been renamed
    _refuse_shared_folders(names, experiment)
    places = {config: out / RUNS / name for config, name in names.items()}
    refuse_own(others, out)
    with folders.claimed(out, lambda: _check(comparison, out, configs, resume, overwrite, experiment)):
        done = comparison.finished(out, places) if resume else {}
        found = finished_in(others, configs, done)
        if resume and len(done) < len(configs):
            refuse_another_version(out, marked.get("version"), list(done.values()))
        data = work.load(configs[0])
        for config in {experiment.label(config): config for config in configs}.values():
            work.build(config, data)
        version = marked.get("version") if resume else wellcond.__version__
        saved = {"version": version, "runs": [config.to_dict() for config in configs]}
        saved["experiment"] = experiment.to_dict(names)
        if resume:
            folders.mark(out, comparison.kind, saved)
        else:
            folders.prepare(out, comparison.kind, saved, comparison.made)
        done |= copy_runs(found, places)
        # Workers use one thread by themselves; runs of this process, among which theirs will stand, used its number.
        threads = open_threads(done.values()) or (torch.get_num_threads() if parallel else None)
        tables = comparison.tables(out, experiment, saved)
        how = parallel or in_this_process(data, progress)
        return comparison.conclude(out, experiment, train_all(places, tables, done, how, finished, work, threads))


def _parallel(jobs: int | None, executor: str | None) -> Executor | None:
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


def _refuse_other_images(configs: Sequence[Any], work: Work) -> None:
    if len({work.images_of(config) for config in configs}) == 1:
        return
    values = {name: dict.fromkeys(getattr(config, name, None) for config in configs) for name in OF_IMAGES}
    differing = "; ".join(f"{name} is {', '.join(map(str, of))}" for name, of in values.items() if len(of) > 1)
    raise ConfigError(f"all runs of a comparison need the same images, and {differing}")


def _refuse_shared_folders(names: Mapping[Any, str], experiment: Experiment) -> None:
    taken: dict[str, Any] = {}
    for config, name in names.items():
        if (other := taken.setdefault(name, config)) != config:
            rows = f"'{experiment.label(other)}' and '{experiment.label(config)}'"
            raise ConfigError(f"rows {rows} would share the folder '{name}': give one of them another name")


def _check(
    comparison: Comparison, out: Path, configs: Sequence[Any], resume: bool, overwrite: bool, experiment: Experiment
) -> None:
    """Raise a `FolderError` if data would be lost, or if the folder holds runs that are not in `configs`."""
    marked = folders.check(out, comparison.kind, resume=resume, overwrite=overwrite)
    if not resume:
        return
    held = list(held_runs(marked, comparison.config))
    recipes = ((marked.get("experiment") or {}).get("recipe"), experiment.recipe)
    # Comparisons of generators of before have their heading beside the runs, and have not saved their recipe.
    if recipes[0] != recipes[1] and "heading" not in marked:
        names = [f"recipe '{recipe}'" if recipe else "a grid without a recipe" for recipe in recipes]
        raise FolderError(f"'{out}' holds {names[0]}, but {names[1]} was given; choose another --out")
    refuse_missing(out, held, configs)
