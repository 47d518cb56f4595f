"""Resuming a comparison: its finished results, number of threads, and version."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import wellcond
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.results.parquet import RESULTS_TABLE, read_results
from wellcond.experiments.run.checkpoints import DAMAGED
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import EARLIER_RESULT, RunResult, load_result

log: logging.Logger = logging.getLogger("wellcond")


def held_results(out: Path, places: Mapping[RunConfig, Path]) -> dict[RunConfig, RunResult]:
    """The results of finished runs, from their folders or, if those are gone, from ``results.parquet``."""
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
            damaged = table.with_name(table.name + DAMAGED)
            os.replace(table, damaged)
            log.warning("%s; it is set aside as '%s', and rewritten from the runs", error, damaged.name)
        else:
            found = {c: in_table[c] for c in places if c in in_table} | found
    return found


def with_threads(configs: Sequence[Any], held: Sequence[Any], apart: bool) -> list[Any]:
    """The grid with the number of CPU threads filled in, as the last bits of a run depend on it.

    Unless configured, it is that of the runs already ``held``, or 1 for runs in ``apart`` processes.
    """
    default = held[0].threads if held else 1 if apart else None
    return [replace(config, threads=default) if config.threads is None else config for config in configs]


def refuse_another_version(out: Path, version: str | None, held: Sequence[Any]) -> None:
    """Raise a `FolderError` if existing results are from another version, as the numbers would not be comparable."""
    made_by = {version, *(result.environment.get("wellcond") for result in held)} - {None}
    if others := sorted(map(str, made_by - {wellcond.__version__})):
        raise FolderError(
            f"'{out}' holds results of wellcond {', '.join(others)}, and this is {wellcond.__version__}: "
            "go on with that version, or choose another --out"
        )
