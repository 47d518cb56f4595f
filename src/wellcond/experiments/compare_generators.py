"""Comparing generators: trains every run of a recipe, then writes the tables.

    OUT/config.json  results.csv  results.json  report.md  runs/ROW-seedN/…

`results.csv` has a line for each finished run, as soon as it has finished; `results.json` the tables and everything of
every run; `report.md` both tables and the traversals of each row's first seed. An interrupted comparison goes on, and
can be extended by seeds.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wellcond.experiments import folders
from wellcond.experiments.files import write_atomically, write_csv, write_json
from wellcond.experiments.grid.attempt import Work
from wellcond.experiments.grid.carry_out import Comparison, carry_out
from wellcond.experiments.latents.config import LatentsConfig
from wellcond.experiments.latents.images import training_images
from wellcond.experiments.latents.result import LatentsResult, load_latents_result
from wellcond.experiments.latents.train import MADE as MADE_BY_RUN
from wellcond.experiments.latents.train import TRAVERSAL, train_generator
from wellcond.experiments.latents.training import AdversarialTraining
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.generators import (
    differences_of_generators,
    differences_table_of_generators,
    generators_table,
    grouped,
)
from wellcond.experiments.results.summary import RUNS
from wellcond.experiments.results.table import Table
from wellcond.experiments.run.command_line import comparison_command
from wellcond.experiments.show.render import for_markdown

KIND = "comparison of generators"
REPORT = "report.md"
MADE = (folders.CONFIG, "results.csv", "results.json", REPORT, ".*.part", *(f"{RUNS}/*/{one}" for one in MADE_BY_RUN))


@dataclass(frozen=True)
class GeneratorTables:
    """`results.csv`, rewritten after every run."""

    out: Path
    label: Callable[[LatentsConfig], str]

    def write(self, results: Iterable[LatentsResult], /) -> None:
        lines = [self._line(result) for result in results]
        if lines:
            write_csv(self.out / "results.csv", list(dict.fromkeys(name for line in lines for name in line)), lines)

    def _line(self, result: LatentsResult) -> dict[str, Any]:
        values = asdict(result)
        config, measures, environment = (values.pop(name) for name in ("config", "measures", "environment"))
        return {"row": self.label(result.config), **config, **values, **(measures or {}), **environment}


def compare_generators(
    configs: Sequence[LatentsConfig],
    out: str | os.PathLike[str],
    *,
    experiment: Experiment,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    jobs: int | None = None,
    executor: str | None = None,
    finished: Callable[[int, LatentsResult], None] = lambda index, result: None,
) -> list[Table]:
    """Train every configuration on the same images, write the tables, and return them.

    A failing run does not stop the others; its error is raised once they have finished.

    Args:
        experiment: the names of the rows and their baselines.
        resume, overwrite, progress, jobs, executor, finished: as in `compare`.

    Raises:
        ConfigError: no configurations, duplicates, different images, fewer images than a batch, an invalid option, or
            an unreachable cluster.
        RunError: ``out`` holds something else, another process uses it, or a run failed; finished runs remain.
        KeyboardInterrupt: Ctrl-C; the comparison can be resumed.
    """
    return carry_out(
        GENERATORS,
        configs,
        out,
        experiment,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        jobs=jobs,
        executor=executor,
        finished=finished,
    )


def _finished(out: Path, places: Mapping[LatentsConfig, Path]) -> dict[LatentsConfig, LatentsResult]:
    found = {config: load_latents_result(folder) for config, folder in places.items()}
    return {config: result for config, result in found.items() if result is not None and result.config == config}


def _tables(out: Path, experiment: Experiment, saved: Mapping[str, Any]) -> GeneratorTables:
    return GeneratorTables(out, experiment.label)


def _conclude(out: Path, experiment: Experiment, results: Sequence[LatentsResult]) -> list[Table]:
    """Write the tables and the report; the tables."""
    groups = grouped(results, experiment.label)
    found = differences_of_generators(groups, experiment.against)
    tables = [generators_table(groups, experiment.heading)]
    if any(one.seeds > 1 for those in found.values() for one in those):
        tables.append(differences_table_of_generators(found))
    differences = {name: [one._asdict() for one in those] for name, those in found.items()}
    write_json(out / "results.json", {"differences": differences, "runs": [asdict(result) for result in results]})
    command = comparison_command(experiment.command, [result.config for result in results])
    parts = [f"# {experiment.heading}", *([f"    {command}"] if command else [])]
    parts += [f"{for_markdown(table)}\n\n{table.caption}" for table in tables]
    parts.append("Each row of a picture moves one latent variable from −3 to 3; seed 0, averaged weights.")
    for row, runs in groups.items():
        picture = Path(runs[0].folder).relative_to(out) / TRAVERSAL
        parts.append(f"## {row}\n\n![Traversals of {row}]({picture.as_posix()})")
    write_atomically(out / REPORT, ("\n\n".join(parts) + "\n").encode())
    return tables


WORK = Work(
    train_generator,
    training_images,
    operator.attrgetter("data", "image_size", "limit"),
    load_latents_result,
    partial(AdversarialTraining, device=torch.device("cpu")),
)
GENERATORS = Comparison(KIND, MADE, LatentsConfig, WORK, _finished, _tables, _conclude)
