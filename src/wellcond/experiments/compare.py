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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.files import write_csv, write_json
from wellcond.experiments.grid import attempt
from wellcond.experiments.grid.carry_out import Comparison, carry_out
from wellcond.experiments.grid.held import held_results
from wellcond.experiments.results.condition import CONDITION_TABLE
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.parquet import RESULTS_TABLE, ResultTables
from wellcond.experiments.results.summary import COMPARISON, RUNS, as_columns, by_label, summarise
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
    return carry_out(
        CLASSIFIERS,
        configs,
        out,
        experiment,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        jobs=jobs,
        executor=executor,
        finished=finished,
        reuse=reuse,
    )


def _tables(out: Path, experiment: Experiment, saved: Mapping[str, Any]) -> ResultTables:
    _warn_of_untreated([RunConfig.from_dict(values) for values in saved["runs"]])
    return ResultTables(out, experiment.label, saved)


def _warn_of_untreated(configs: Sequence[RunConfig]) -> None:
    names = dict.fromkeys(config.label for config in configs if not is_treatable(config.norm, config.head))
    if names and any(config.treat != NO_TREATMENT for config in configs):
        log.warning("%s: trained without a treatment, as there is no spectral layer to treat", ", ".join(names))


def _conclude(out: Path, experiment: Experiment, results: Sequence[RunResult]) -> list[Any]:
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


CLASSIFIERS = Comparison(COMPARISON, MADE, RunConfig, attempt.CLASSIFIERS, held_results, _tables, _conclude)
