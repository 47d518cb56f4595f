"""A grid of configurations × seeds: trained one after another, then the table and the figure.

    OUT/config.json  results.csv  results.json  condition.png  condition.svg  runs/LABEL-seedN/…

`results.csv` is the table, one line a configuration and layer; `results.json` has it with every run and the machine.
An interrupted comparison goes on where it was: finished runs are read back, the one under way is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.files import write_csv, write_json
from wellcond.experiments.results.summary import COMPARISON, RUNS, by_label, configs_in, summarise
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult
from wellcond.experiments.run.train import MADE as MADE_BY_RUN
from wellcond.experiments.run.train import build, run
from wellcond.experiments.show.figures import condition_figure, save_figure

FIGURE = "condition"
MADE = (
    *(folders.CONFIG, "results.csv", "results.json", f"{FIGURE}.png", f"{FIGURE}.svg"),
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
) -> list[Any]:
    """Run every configuration, all on the same data, and write table and figure; the rows of the table.

    `resume`, `overwrite` and `progress` are as in `run`; `finished` is called with the index and the result of every
    run that is done.

    Raises:
        ConfigError: no configuration, the same twice, or different data.
        RunError, ValueError, KeyboardInterrupt: as `run`; finished runs remain.
    """
    out = Path(out)
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    if len({(config.data, config.image_size, config.limit) for config in configs}) > 1:
        raise ConfigError("a comparison is on one data set")
    held = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    if resume:
        _refuse_another_grid(out, configs_in(held), configs)
    data = load_images(configs[0].data, image_size=configs[0].image_size, limit=configs[0].limit)
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
    rows = summarise(results)
    table = [row._asdict() for row in rows]
    write_csv(out / "results.csv", rows[0]._fields, table)
    write_json(out / "results.json", {"rows": table, "runs": [asdict(result) for result in results]})
    config = configs[0]
    seeds = len({config.seed for config in configs})
    band = f"median of {seeds} seeds, band from minimum to maximum" if seeds > 1 else f"seed {config.seed}"
    figure = condition_figure(by_label(results), f"{config.model} on {Path(config.data).name}: {band}")
    save_figure(figure, out / FIGURE)
    return rows


def _refuse_another_grid(out: Path, held: Sequence[RunConfig], configs: Sequence[RunConfig]) -> None:
    if held != list(configs):
        labels = ", ".join(dict.fromkeys(config.label for config in held))
        seeds = len({config.seed for config in held})
        raise FolderError(
            f"cannot resume '{out}' with other options: it holds {labels} with {seeds} seeds on {held[0].data}; "
            "leave the options out, or choose another --out"
        )
