"""A grid of configurations × seeds: trained one after another, then the table and the figure.

    OUT/config.json  results.csv  results.json  condition.png  condition.svg  runs/LABEL-seedN/…

`results.csv` is the table, one line a configuration and layer; `results.json` has it with every run and the machine.
An interrupted comparison goes on where it was: finished runs are read back, the one under way is resumed. It grows in
the same way, by seeds, treatments, norms or heads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.data.load import ImageData
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.files import write_csv, write_json
from wellcond.experiments.results.summary import COMPARISON, RUNS, as_columns, by_label, configs_in, summarise
from wellcond.experiments.run.build import build, load
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig
from wellcond.experiments.run.parts import is_treatable
from wellcond.experiments.run.result import EARLIER_RESULT, RunResult, load_result
from wellcond.experiments.run.train import MADE as MADE_BY_RUN
from wellcond.experiments.run.train import run
from wellcond.experiments.show.figures import condition_figure, save_figure

log = logging.getLogger("wellcond")

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

    `overwrite` and `progress` are as in `run`; with `resume` the configurations may be more than the folder holds.
    `finished` is called with the index and the result of every run that is done.

    Raises:
        ConfigError: no configuration, the same twice, or different data.
        RunError, ValueError, KeyboardInterrupt: as `run`; finished runs remain.
    """
    out = Path(out)
    if not configs:
        raise ConfigError("nothing to compare: the grid is empty")
    if len(set(configs)) < len(configs):
        raise ConfigError("the same configuration and seed is in the grid twice")
    if len({(config.data, config.image_size, config.limit, config.crop) for config in configs}) > 1:
        raise ConfigError("a comparison is on one data set")
    with folders.claimed(out, lambda: _check(out, configs, resume, overwrite)):
        data = load(configs[0])
        for config in {config.label: config for config in configs}.values():  # find what is wrong before writing
            build(config, data)
        grid = {"runs": [config.to_dict() for config in configs]}
        if resume:
            folders.mark(out, COMPARISON, grid)
        else:
            folders.prepare(out, COMPARISON, grid, MADE)
        _say_what_stays_untreated(configs)
        results = _results(configs, out, data, progress, finished)
        return _write(configs, results, out)


def _say_what_stays_untreated(configs: Sequence[RunConfig]) -> None:
    names = dict.fromkeys(config.label for config in configs if not is_treatable(config.norm, config.head))
    if names and any(config.treat != NO_TREATMENT for config in configs):
        log.warning("%s: trained without a treatment, as there is no spectral layer to treat", ", ".join(names))


def _results(
    configs: Sequence[RunConfig],
    out: Path,
    data: ImageData,
    progress: bool,
    finished: Callable[[int, RunResult], None],
) -> list[RunResult]:
    """Of every run, trained or resumed where it has not finished."""
    results = []
    for index, config in enumerate(configs):
        folder = out / RUNS / config.folder_name
        # Of one that was made longer since, what it had found by then.
        result = load_result(folder, EARLIER_RESULT.format(config.epochs))
        if result is None or result.config != config:
            begun = (folder / folders.CONFIG).exists()
            result = run(config, folder, resume=begun, data=data, progress=progress)
        results.append(result)
        finished(index, results[-1])
    return results


def _write(configs: Sequence[RunConfig], results: Sequence[RunResult], out: Path) -> list[Any]:
    """The table and the figure; the rows of the table."""
    rows = summarise(results)
    table = [as_columns(row, configs[0]) for row in rows]
    write_csv(out / "results.csv", list(table[0]), table)
    write_json(out / "results.json", {"rows": table, "runs": [asdict(result) for result in results]})
    config = configs[0]
    seeds = len({config.seed for config in configs})
    band = f"median of {seeds} seeds, band from minimum to maximum" if seeds > 1 else f"seed {config.seed}"
    figure = condition_figure(by_label(results), f"{config.model} on {Path(config.data).name}: {band}")
    save_figure(figure, out / FIGURE)
    return rows


def _check(out: Path, configs: Sequence[RunConfig], resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost, or that holds what is not among `configs`."""
    marked = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    if not resume:
        return
    held = configs_in(marked)
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
