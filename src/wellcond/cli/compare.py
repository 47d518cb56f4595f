"""`wellcond compare`: a grid of runs, from options or from a recipe."""

from __future__ import annotations

import itertools
import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import DEFAULT_COMPARISON, Debug, Overwrite, Resume, listed, takes_run_options
from wellcond.cli.reporting import console, reporting, say
from wellcond.experiments.errors import FolderError
from wellcond.experiments.folders import kind_of, read_config
from wellcond.experiments.grid.configs import grid, refuse_unused
from wellcond.experiments.run.command_line import comparison_command, option_words
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig
from wellcond.experiments.run.parts import is_treatable

DEFAULT_TREATS = (NO_TREATMENT, "nog", "olr", "ow", "nog+ow+olr")


@takes_run_options(
    norm=Annotated[list[str] | None, typer.Option(help="repeat, or separate with commas; default batch,zca")],
    head=Annotated[list[str] | None, typer.Option(help="as --norm; default avg")],
    treat=Annotated[list[str] | None, typer.Option(help=f"as --norm; default {','.join(DEFAULT_TREATS)}")],
    seed=Annotated[int | None, typer.Option("--seeds", help="runs per configuration, with seeds 0, 1, …; default 2")],
)
def compare(
    asked: dict[str, Any],
    recipe: Annotated[str | None, typer.Option(help="table4, fig1, … (see wellcond recipes), or a .toml file")] = None,
    scale: Annotated[str | None, typer.Option(help="scale of the recipe: full, or a smaller one such as small")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="only these rows of the recipe (repeat); default all")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder; default comparison, or the recipe's name")] = None,
    jobs: Annotated[int | None, typer.Option(help="parallel runs, each in its own process; default 1")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or ray://HOST:PORT, to run on a cluster")] = None,
    reuse: Annotated[list[Path] | None, typer.Option(help="copy finished runs of this comparison (repeat)")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a grid of configurations × seeds; produces the paper's table with condition numbers, and the figure."""
    resume_commands: list[str] = []
    with reporting(debug, logging.WARNING, resume_commands):
        if recipe is None and (scale or rows):
            raise ValueError(f"{'--scale' if scale else '--rows'} needs --recipe, such as --recipe table4")
        out = out or (Path(Path(recipe).stem) if recipe else DEFAULT_COMPARISON)
        given = {"resume": resume, "overwrite": overwrite, "jobs": jobs, "executor": executor}
        if recipe is not None and _is_of_generators(recipe):
            if reuse:
                raise ValueError("--reuse copies runs of classifiers, and the recipe is of generators; leave it out")
            configs, experiment = _from_recipe(recipe, scale, rows, asked)
            again = comparison_command(experiment.command, configs)
            resume_commands.append(f"{again} {_resuming(out, jobs, executor)}")
            _compare_generators(configs, experiment, out, given)
            return
        from wellcond.experiments.compare import compare as compare_runs
        from wellcond.experiments.results.difference_tables import differences_table
        from wellcond.experiments.results.tables import comparison_table
        from wellcond.experiments.show.render import for_terminal

        if recipe is not None:
            configs, experiment = _from_recipe(recipe, scale, rows, asked)
        else:
            configs, experiment = _from_options(asked, out, resume)
        refuse_unused(asked, configs)
        resume_commands.append(f"wellcond compare {_resuming(out, jobs, executor, reuse or ())}")
        results: list[Any] = []

        def finished(index: int, result: Any) -> None:
            results.append(result)
            say(
                f"[{len(results)}/{len(configs)}] {experiment.label(result.config)}, seed {result.config.seed}: "
                f"test error {100 * result.test_error:.2f} %, {result.seconds:.1f} s"
            )

        summary = compare_runs(
            configs,
            out,
            **given,
            progress=console.is_terminal,
            reuse=reuse or (),
            experiment=experiment,
            finished=finished,
        )
        console.print(for_terminal(comparison_table(summary, experiment.heading)))
        if found := [difference for difference in experiment.differences(results) if difference.seeds > 1]:
            console.print(for_terminal(differences_table(found, experiment.papers_differences())))
        say(f"in {out}: results.csv, results.json, results.parquet, condition.parquet, condition.png, condition.svg")


def _resuming(out: Path, jobs: int | None, executor: str | None, reuse: Sequence[Path] = ()) -> str:
    """The options that go on with a comparison, in the same way."""
    words = ["--out", str(out), "--resume"]
    for name, value in {"jobs": jobs, "executor": executor}.items():
        words += option_words(name, value) if value is not None else []
    for other in reuse:
        words += option_words("reuse", other)
    return shlex.join(words)


def _from_recipe(recipe: str, scale: str | None, rows: list[str] | None, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The configurations of a recipe, and its experiment."""
    from wellcond.experiments.results.experiment import Experiment

    found, configs, command = _runs_of(recipe, scale, rows, asked)
    experiment = Experiment.of_recipe(found, configs, command)
    return [config for row in configs.values() for config in row], experiment


def _is_of_generators(recipe: str) -> bool:
    from wellcond.experiments.recipes import GENERATOR, load_recipe

    return load_recipe(recipe).task == GENERATOR


def _compare_generators(configs: list[Any], experiment: Any, out: Path, given: dict[str, Any]) -> None:
    """Train the generators of a recipe, and print their tables."""
    from wellcond.experiments.compare_generators import REPORT, compare_generators
    from wellcond.experiments.show.render import for_terminal

    numbers = itertools.count(1)

    def finished(index: int, result: Any) -> None:
        at = f"[{next(numbers)}/{len(configs)}] {experiment.label(result.config)}, seed {result.config.seed}"
        say(f"{at}: κ(U) {result.kappa_directions:.4g}, {result.seconds:.1f} s")

    told = {"experiment": experiment, "progress": console.is_terminal, "finished": finished}
    for table in compare_generators(configs, out, **told, **given):
        console.print(for_terminal(table))
    say(f"in {out}: results.csv, results.json, {REPORT}")


def _runs_of(
    recipe: str, scale: str | None, rows: list[str] | None, asked: dict[str, Any]
) -> tuple[Any, dict[str, Any], str]:
    """A recipe with these rows, the configurations of each, and the command line but for its seeds."""
    from wellcond.experiments.recipes import FULL, load_recipe

    options = {**asked}
    for name in ("norm", "head", "treat"):
        if name in options:
            values = listed(options[name])
            if len(values) > 1:
                raise ValueError(f"a recipe takes one --{name} for all its rows, got {', '.join(values)}")
            options[name] = values[0]
    found = load_recipe(recipe)
    if rows:
        found = found.with_rows(rows)
    seeds = options.pop("seed", None)
    configs = found.configs(scale or FULL, seeds, **options)
    words = ["wellcond", "compare", "--recipe", recipe]
    if scale:
        words += ["--scale", scale]
    for row in rows or ():
        words += ["--rows", row]
    for name, value in options.items():
        words += option_words(name, value)
    return found, configs, shlex.join(words)


def _from_options(asked: dict[str, Any], out: Path, resume: bool) -> tuple[Any, Any]:
    """The configurations of a grid and its experiment; those of the comparison in ``out`` if it is resumed."""
    from wellcond.experiments.results.experiment import Experiment

    if resume:
        _refuse_generators(out)
    held = read_config(out, "comparison") if resume else {}
    described = held.get("experiment") or {}
    if (recipe := described.get("recipe")) is None:
        configs = _grid(asked, out, resume)
        return configs, Experiment.from_dict(None if asked else described or None, configs)
    from wellcond.experiments.results.summary import configs_in

    configs = configs_in(held)
    experiment = Experiment.from_dict(described, configs)
    if set(asked) - {"seed"}:
        raise ValueError(
            f"'{out}' holds recipe '{recipe}': with --resume give either --recipe {recipe} and all of its options, or "
            "only --seeds"
        )
    if "seed" in asked:
        rows = dict.fromkeys(replace(config, seed=0) for config in configs)
        configs = [replace(config, seed=seed) for config in rows for seed in range(asked["seed"])]
    return configs, experiment


def _refuse_generators(out: Path) -> None:
    """Say how to go on with a comparison of generators: their rows are in the recipe alone."""
    from wellcond.experiments.compare_generators import KIND
    from wellcond.experiments.grid.held import held_runs
    from wellcond.experiments.latents.config import LatentsConfig

    if kind_of(out) != KIND:
        return
    held = read_config(out, KIND)
    configs = list(held_runs(held, LatentsConfig))
    saved = held.get("experiment") or held  # before, the command was beside the runs
    again = comparison_command(saved.get("command") or "wellcond compare --recipe RECIPE", configs)
    raise FolderError(f"'{out}' holds a {KIND}: go on with it by {again} {_resuming(out, None, None)}")


def _grid(asked: dict[str, Any], out: Path, resume: bool) -> list[RunConfig]:
    """The grid of the given options; when resuming, missing ones are taken from the comparison in ``out``."""
    axes: dict[str, Any] = {"norm": ["batch", "zca"], "head": ["avg"], "treat": list(DEFAULT_TREATS), "seed": range(2)}
    shared: dict[str, Any] = {}
    if resume:
        from wellcond.experiments.results.summary import configs_in

        held = configs_in(read_config(out, "comparison"))
        if not asked:
            return held
        axes = {name: list(dict.fromkeys(getattr(config, name) for config in held)) for name in axes}
        if treatable := [config for config in held if is_treatable(config.norm, config.head)]:
            axes["treat"] = list(dict.fromkeys(config.treat for config in treatable))
        shared = {name: value for name, value in held[0].to_dict().items() if name not in axes}
        shared["solver"] = next((config.solver for config in held if config.solver is not None), None)
    for name, value in asked.items():
        if name == "seed":
            if value < 1:
                raise ValueError(f"seeds must be at least 1, got {value}")
            axes[name] = range(value)
        elif name in axes:
            axes[name] = listed(value)
        else:
            shared[name] = value
    return grid(*axes.values(), **shared)
