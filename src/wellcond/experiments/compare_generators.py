"""Comparing generators: trains every run of a recipe, then writes the tables.

    OUT/config.json  results.csv  results.json  report.md  runs/ROW-seedN/…

`results.csv` has a line for each finished run, as soon as it has finished; `results.json` the tables and everything of
every run; `report.md` both tables and the traversals of each row's first seed. An interrupted comparison goes on, and
can be extended by seeds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import wellcond
from wellcond.experiments import folders
from wellcond.experiments.compare import parallel_executor
from wellcond.experiments.errors import FolderError
from wellcond.experiments.files import write_atomically, write_csv, write_json
from wellcond.experiments.grid.attempt import Work, in_this_process
from wellcond.experiments.grid.held import refuse_another_version, with_threads
from wellcond.experiments.grid.train_all import train_all
from wellcond.experiments.latents.config import LatentsConfig
from wellcond.experiments.latents.images import training_images
from wellcond.experiments.latents.result import LatentsResult, load_latents_result
from wellcond.experiments.latents.train import MADE as MADE_BY_RUN
from wellcond.experiments.latents.train import TRAVERSAL, train_generator
from wellcond.experiments.results.generators import (
    differences_of_generators,
    differences_table_of_generators,
    generators_table,
    grouped,
)
from wellcond.experiments.results.summary import RUNS
from wellcond.experiments.results.table import Table
from wellcond.experiments.show.render import for_markdown

COMPARISON = "comparison of generators"
REPORT = "report.md"
MADE = (folders.CONFIG, "results.csv", "results.json", REPORT, ".*.part", *(f"{RUNS}/*/{one}" for one in MADE_BY_RUN))


def _images_of(config: LatentsConfig) -> tuple[Any, ...]:
    return config.data, config.image_size, config.limit, config.batch_size


GENERATORS = Work(train_generator, training_images, _images_of, load_latents_result)


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
    rows: Mapping[str, Sequence[LatentsConfig]],
    out: str | os.PathLike[str],
    *,
    heading: str,
    against: Mapping[str, str],
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    jobs: int | None = None,
    executor: str | None = None,
    finished: Callable[[str, LatentsResult], None] = lambda row, result: None,
) -> list[Table]:
    """Train the configurations of every row, write the tables, and return them.

    A failing run does not stop the others; its error is raised once they have finished.

    Args:
        rows: the configurations by the name of their row, all of the same images.
        heading, command: of the tables, and the command line that made them.
        against: the baseline of each row.
        resume, overwrite, progress, jobs, executor: as in `compare`.
        finished: called with the row and the result of every finished run, in the order of completion.

    Raises:
        ConfigError: an invalid ``jobs``, or an unreachable cluster.
        RunError: ``out`` holds something else, another process uses it, or a run failed; finished runs remain.
        KeyboardInterrupt: Ctrl-C; the comparison can be resumed.
    """
    out = Path(out)
    parallel = parallel_executor(jobs, executor)
    held = folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
    names = {_apart(config): row for row, configs in rows.items() for config in configs}
    began = [LatentsConfig.from_dict(values) for values in held.get("runs", ())] if resume else []
    configs = with_threads([one for row in rows.values() for one in row], began, apart=parallel is not None)

    def label(config: LatentsConfig) -> str:
        return names[_apart(config)]

    places = {config: out / RUNS / _folder(label(config), config.seed) for config in configs}

    def check() -> None:
        folders.check(out, COMPARISON, resume=resume, overwrite=overwrite)
        if missing := [config for config in began if config not in places]:
            folders.refuse_conflicts(began[0].to_dict(), replace(configs[0], **_axes(began[0])).to_dict(), out)
            raise FolderError(
                f"cannot resume '{out}' without all of its runs: {len(missing)} of them are not asked for; give the "
                "same rows and at least as many --seeds, or choose another --out"
            )

    with folders.claimed(out, check):
        done = {c: found for c, place in places.items() if (found := load_latents_result(place)) and found.config == c}
        if resume and len(done) < len(configs):
            refuse_another_version(out, held.get("version"), list(done.values()))
        data = training_images(configs[0])
        grid = {"version": held.get("version") if resume else wellcond.__version__, "command": command}
        grid |= {"heading": heading, "runs": [config.to_dict() for config in configs]}
        if resume:
            folders.mark(out, COMPARISON, grid)
        else:
            folders.prepare(out, COMPARISON, grid, MADE)
            done = {}
        executed = parallel or in_this_process(data, progress)

        def told(_: int, result: LatentsResult) -> None:
            finished(label(result.config), result)

        results = train_all(places, GeneratorTables(out, label), done, executed, told, GENERATORS)
        return _write(results, out, heading, command, against, label)


def _write(
    results: Sequence[LatentsResult],
    out: Path,
    heading: str,
    command: str,
    against: Mapping[str, str],
    label: Callable[[LatentsConfig], str],
) -> list[Table]:
    groups = grouped(results, label)
    found = differences_of_generators(groups, against)
    tables = [generators_table(groups, heading)]
    if any(one.seeds > 1 for those in found.values() for one in those):
        tables.append(differences_table_of_generators(found))
    differences = {name: [one._asdict() for one in those] for name, those in found.items()}
    write_json(out / "results.json", {"differences": differences, "runs": [asdict(result) for result in results]})
    parts = [f"# {heading}", *([f"    {command}"] if command else [])]
    parts += [f"{for_markdown(table)}\n\n{table.caption}" for table in tables]
    parts.append("Each row of a picture moves one latent variable from −3 to 3; seed 0, averaged weights.")
    for row, runs in groups.items():
        picture = Path(runs[0].folder).relative_to(out) / TRAVERSAL
        parts.append(f"## {row}\n\n![Traversals of {row}]({picture.as_posix()})")
    write_atomically(out / REPORT, ("\n\n".join(parts) + "\n").encode())
    return tables


def _apart(config: LatentsConfig) -> LatentsConfig:
    return replace(config, seed=0, threads=None)


def _axes(config: LatentsConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("treat", "model", "seed")}


def _folder(row: str, seed: int) -> str:
    return f"{re.sub('[^a-zA-Z0-9]+', '-', row).strip('-').lower()}-seed{seed}"
