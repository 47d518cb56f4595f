"""Finished runs of another comparison, so that recipes which share rows train them once."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.errors import FolderError
from wellcond.experiments.files import write_csv
from wellcond.experiments.grid.held import held_results, refuse_another_version
from wellcond.experiments.results.condition import RECORDED, condition_rows
from wellcond.experiments.results.summary import COMPARISON, RUNS, configs_in, run_folders
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import CONDITION, EARLIER_RESULT, RESULT, RunResult, load_result
from wellcond.experiments.run.run_folder import CHECKPOINTS, KIND

LEFT_OUT = (CHECKPOINTS, RESULT, EARLIER_RESULT.format("*"), folders.CONFIG, ".*")


def refuse_own(comparisons: Sequence[Path], out: Path) -> None:
    """Raise a `FolderError` if the runs of one of these are those of ``out``, also by a link: they may be deleted."""
    for other in comparisons:
        if _places(other) & _places(out):
            raise FolderError(
                f"'{other}' is the output folder, and cannot be reused for itself: keep its runs by --resume, without "
                "--reuse"
            )


def _places(comparison: Path) -> set[Path]:
    """Where a comparison and its runs really are."""
    runs = comparison / RUNS
    return {path.resolve() for path in (comparison, runs, *runs.glob("*"))}


def finished_in(
    comparisons: Sequence[Path], wanted: Sequence[RunConfig], done: Collection[RunConfig] = ()
) -> dict[RunConfig, RunResult]:
    """The finished runs in these comparisons that have a ``wanted`` configuration and are not yet ``done``.

    Writes nothing. A comparison all of whose shared runs are done has nothing to add, and is no error.

    Raises:
        FolderError: a folder without a comparison, one without such a run, or results of another
            version, or one without its condition numbers.
    """
    found: dict[RunConfig, RunResult] = {}
    for other in comparisons:
        if folders.kind_of(other) != COMPARISON:
            raise FolderError(f"'{other}' holds no comparison from which runs could be reused")
        marked = folders.read_config(other, COMPARISON)
        names = zip(configs_in(marked), run_folders(marked), strict=True)
        places = {config: other / RUNS / name for config, name in names if config in wanted}
        held = held_results(other, places, ours=False)
        if not held:
            alike = {replace(config, threads=None) for config in configs_in(marked)}
            others = alike & {replace(config, threads=None) for config in wanted}
            hint = "; they differ in threads: give the same --threads, or --jobs in both" if others else ""
            raise FolderError(f"'{other}' holds no finished run of a configuration that is compared here{hint}")
        missing = {config: result for config, result in held.items() if config not in done}
        if missing:
            refuse_another_version(other, marked.get("version"), list(missing.values()))
            for result in missing.values():
                _records(result)
        found = missing | found
    return found


def copy_runs(found: Mapping[RunConfig, RunResult], places: Mapping[RunConfig, Path]) -> dict[RunConfig, RunResult]:
    """Copy these runs to their places, without checkpoints; the results of the copies.

    Of a run whose folder is gone, or was extended since, the result and the condition numbers are restored.
    """
    copies = {}
    for config, result in found.items():
        source, target = Path(result.folder), places[config]
        target.mkdir(parents=True, exist_ok=True)
        folders.mark(target, KIND, config.to_dict())  # first, so that a copy which was killed is a run that was begun
        if load_result(source) == result and (not result.conditions or (source / CONDITION).exists()):
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
        else:
            rows = _records(result)
            write_csv(target / CONDITION, list(RECORDED), rows)
        copies[config] = replace(result, folder=str(target))
        copies[config].save()  # last, as it marks the run as finished
    return copies


def _records(result: RunResult) -> list[dict[str, Any]]:
    """The condition numbers of a run up to its last step; a `FolderError` if it had some and they are gone."""
    rows = [row for row in condition_rows(result) if int(row["step"]) < result.steps]
    if result.conditions and not rows:
        raise FolderError(f"the condition numbers of '{result.folder}' are gone, so that it cannot be reused")
    return rows
