"""Resuming a comparison: its runs, their finished results, number of threads, and version."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.results.parquet import RESULTS_TABLE, read_results
from wellcond.experiments.run.checkpoints import DAMAGED
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import EARLIER_RESULT, RunResult, load_result

AXES = {"norm", "head", "treat", "seed"}
"""The options by which the runs of a grid differ: runs that differ in these alone are other runs, not other options."""

log: logging.Logger = logging.getLogger("wellcond")


def held_runs(comparison: Mapping[str, Any], config: Any) -> dict[Any, str | None]:
    """The runs in the ``config.json`` of a comparison, of this class of configurations, and the names of their folders.

    The names are None in comparisons that have not saved them. A `FolderError` if this version cannot read it.
    """
    try:
        configs = [config.from_dict(values) for values in comparison["runs"]]
        names = (comparison.get("experiment") or {}).get("folders") or [None] * len(configs)
        return dict(zip(configs, names, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        made_by = f" of wellcond {comparison['version']}" if comparison.get("version") else ""
        raise FolderError(
            f"this is not a comparison{made_by} that wellcond {wellcond.__version__} can go on with ({error}): "
            "use the version that began it, or choose another --out"
        ) from error


def held_results(out: Path, places: Mapping[RunConfig, Path], *, ours: bool = True) -> dict[RunConfig, RunResult]:
    """The results of finished runs, from their folders or, if those are gone, from ``results.parquet``.

    A damaged table is set aside if the comparison is ``ours`` to change.
    """
    found = {}
    for config, folder in places.items():
        # A run that was extended since keeps its earlier result.
        for result in (load_result(folder, EARLIER_RESULT.format(config.epochs)), load_result(folder)):
            if result is not None and result.config == config:
                found[config] = result
                break
    table = out / RESULTS_TABLE
    if len(found) < len(places) and table.exists():
        try:
            in_table = {result.config: result for result in read_results(table)}
        except RunError as error:
            if ours:
                damaged = table.with_name(table.name + DAMAGED)
                os.replace(table, damaged)
                log.warning("%s; it is set aside as '%s', and rewritten from the runs", error, damaged.name)
            else:
                log.warning("%s; only runs whose folders are there are taken from '%s'", error, out)
        else:
            found = {c: in_table[c] for c in places if c in in_table} | found
    return found


def refuse_missing(out: Path, held: Sequence[Any], configs: Collection[Any]) -> None:
    """Raise a `FolderError` if runs that ``out`` holds are not among ``configs``; it names what differs from a run that
    is new, if those are options."""
    asked = set(configs)
    missing = [config.to_dict() for config in held if config not in asked]
    if not missing:
        return
    new = [config.to_dict() for config in configs if config not in set(held)]

    def differing(pair: tuple[dict[str, Any], dict[str, Any]]) -> tuple[bool, int]:
        names = {name for name, value in pair[0].items() if pair[1][name] != value}
        return bool(names & AXES), len(names)

    pairs = [(one, other) for one in missing for other in new]
    if pairs and not differing(nearest := min(pairs, key=differing))[0]:
        folders.refuse_conflicts(*nearest, out)
    labels = ", ".join(dict.fromkeys(config.label for config in held))
    seeds = len({config.seed for config in held})
    raise FolderError(
        f"cannot resume '{out}' without all of its runs: it holds {labels} with {seeds} seeds on {held[0].data}, and "
        f"{len(missing)} of these runs are not asked for; leave options out, name these runs too, or choose another "
        "--out"
    )


def with_threads(configs: Sequence[Any], held: Sequence[Any], apart: bool) -> list[Any]:
    """The grid with the number of CPU threads filled in, as the last bits of a run depend on it.

    Unless configured, it is that of ``held`` runs of the same row, or of the first one, or 1 for runs in ``apart``
    processes.
    """
    rows = {replace(config, seed=0, threads=None): config.threads for config in held}
    default = held[0].threads if held else 1 if apart else None
    return [
        replace(config, threads=rows.get(replace(config, seed=0), default)) if config.threads is None else config
        for config in configs
    ]


def open_threads(results: Iterable[Any]) -> int | None:
    """The number of CPU threads of finished runs whose configuration leaves it open; None without such a run."""
    had = (result.environment.get("threads") for result in results if result.config.threads is None)
    return next((int(number) for number in had if number), None)


def refuse_another_version(out: Path, version: str | None, held: Sequence[Any]) -> None:
    """Raise a `FolderError` if existing results are from another version, as the numbers would not be comparable."""
    made_by = {version, *(result.environment.get("wellcond") for result in held)} - {None}
    if others := sorted(map(str, made_by - {wellcond.__version__})):
        raise FolderError(
            f"'{out}' holds results of wellcond {', '.join(others)}, and this is {wellcond.__version__}: "
            "go on with that version, or choose another --out"
        )
