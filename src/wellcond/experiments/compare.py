"""A grid of configurations × seeds: trained one after another, then the table and the figure.

    OUT/config.json  results.csv  results.json  condition.png  condition.svg  runs/LABEL-seedN/…

`results.csv` is the table, one line a configuration and layer; `results.json` has it with every run and the machine.
An interrupted comparison goes on where it was: finished runs are read back, the one under way is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from wellcond.experiments import folders
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.files import write_csv, write_json
from wellcond.experiments.results.summary import COMPARISON, RUNS, Row, by_label, configs_in, summarise
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult
from wellcond.experiments.run.train import MADE as MADE_BY_RUN
from wellcond.experiments.run.train import build, run
from wellcond.experiments.show.figures import condition_figure, save_figure

TABLE, EVERYTHING, FIGURE = "results.csv", "results.json", "condition"
MADE = (
    folders.CONFIG,
    TABLE,
    EVERYTHING,
    f"{FIGURE}.png",
    f"{FIGURE}.svg",
    *(f"{RUNS}/*/{pattern}" for pattern in MADE_BY_RUN),
)


def compare(
    configs: Sequence[RunConfig],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    finished: Callable[[int, RunResult], None] = lambda index, result: None,
) -> list[Row]:
    """Run every configuration and write table and figure; the rows of the table.

    Args:
        configs: what to run; all on the same data.
        out: the folder; made if it is not there.
        resume: go on with the comparison that `out` holds.
        overwrite: delete it (what it made, nothing else) and start afresh.
        progress: show a progress bar for the run under way.
        finished: called with the index and the result of every run that is done.

    Raises:
        ConfigError: no configuration, the same twice, or different data.
        RunError, ValueError, KeyboardInterrupt: as `run`; finished runs remain.
    """
    out = Path(out)
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    if len({(config.data, config.limit) for config in configs}) > 1:
        raise ConfigError("a comparison is on one data set")
    held = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    if resume:
        _refuse_another_grid(out, configs_in(held), configs)
    data = load_images(configs[0].data, limit=configs[0].limit)
    for config in {config.label: config for config in configs}.values():  # find what is wrong before writing
        build(config, data)
    if not resume:
        folders.prepare(out, COMPARISON, {"runs": [config.to_dict() for config in configs]}, MADE)
    results = []
    for index, config in enumerate(configs):
        folder = out / RUNS / config.folder_name
        begun = (folder / folders.CONFIG).exists()
        results.append(run(config, folder, resume=begun, data=data, progress=progress))
        finished(index, results[-1])
    return _write(out, results)


def _refuse_another_grid(out: Path, held: Sequence[RunConfig], configs: Sequence[RunConfig]) -> None:
    if held != list(configs):
        labels = ", ".join(dict.fromkeys(config.label for config in held))
        seeds = len({config.seed for config in held})
        raise FolderError(
            f"cannot resume '{out}' with other options: it holds {labels} with {seeds} seeds on {held[0].data}; "
            "leave the options out, or choose another --out"
        )


def _write(out: Path, results: Sequence[RunResult]) -> list[Row]:
    """Write table, runs and figure."""
    rows = summarise(results)
    columns = [field.name for field in fields(Row)]
    write_csv(out / TABLE, columns, (asdict(row) for row in rows))
    write_json(
        out / EVERYTHING,
        {"rows": [asdict(row) for row in rows], "runs": [asdict(result) for result in results]},
    )
    config = results[0].config
    seeds = len({result.config.seed for result in results})
    band = f"median of {seeds} seeds, band from minimum to maximum" if seeds > 1 else f"seed {config.seed}"
    figure = condition_figure(by_label(results), f"{config.model} on {Path(config.data).name}: {band}")
    save_figure(figure, out / FIGURE)
    return rows
