"""`wellcond compare`: a grid of runs, as asked or of a recipe."""

from __future__ import annotations

import itertools
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import DEFAULT_COMPARISON, Debug, Overwrite, Resume, listed, takes_run_options
from wellcond.cli.reporting import console, reporting, say
from wellcond.experiments.folders import read_config
from wellcond.experiments.run.command_line import option_words
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig, grid, refuse_what_nothing_takes
from wellcond.experiments.run.parts import is_treatable

DEFAULT_TREATS = (NO_TREATMENT, "nog", "olr", "ow", "nog+ow+olr")


@takes_run_options(
    norm=Annotated[list[str] | None, typer.Option(help="repeat, or separate by commas; default batch,zca")],
    head=Annotated[list[str] | None, typer.Option(help="as --norm; default avg")],
    treat=Annotated[list[str] | None, typer.Option(help=f"as --norm; default {','.join(DEFAULT_TREATS)}")],
    seed=Annotated[int | None, typer.Option("--seeds", help="runs of each configuration, seeded 0, 1, …; default 2")],
)
def compare(
    asked: dict[str, Any],
    recipe: Annotated[str | None, typer.Option(help="table4, fig1, …: see wellcond recipes; or a file .toml")] = None,
    scale: Annotated[str | None, typer.Option(help="of the recipe: full, or what makes it smaller, as small")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="these rows of the recipe, repeat; default all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the comparison's folder; default comparison, or the recipe's name")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at once, each in a process of its own; default 1")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or ray://HOST:PORT: on a cluster")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a grid of configurations × seeds; a table as the paper's with condition numbers, and the figure."""
    again: list[str] = []
    with reporting(debug, logging.WARNING, again):
        if recipe is None and (scale or rows):
            raise ValueError(f"{'--scale' if scale else '--rows'} is of a recipe: give --recipe, as table4")
        out = out or (Path(Path(recipe).stem) if recipe else DEFAULT_COMPARISON)
        from wellcond.experiments.compare import compare as compare_runs
        from wellcond.experiments.results.difference_tables import differences_table
        from wellcond.experiments.results.tables import comparison_table
        from wellcond.experiments.show.render import for_terminal

        if recipe is not None:
            configs, experiment = _of_recipe(recipe, scale, rows, asked)
        else:
            configs, experiment = _of_grid(asked, out, resume)
        refuse_what_nothing_takes(asked, configs)
        again.append(f"wellcond compare --out {out} --resume")

        ends = itertools.count(1)

        results: list[Any] = []

        def finished(index: int, result: Any) -> None:
            config = result.config
            results.append(result)
            say(
                f"[{next(ends)}/{len(configs)}] {experiment.label(config)}, seed {config.seed}: "
                f"test error {100 * result.test_error:.2f} %, {result.seconds:.1f} s"
            )

        options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "jobs": jobs, "executor": executor}
        options |= {"experiment": experiment, "progress": console.is_terminal, "finished": finished}
        summary = compare_runs(configs, out, **options)
        console.print(for_terminal(comparison_table(summary, experiment.heading)))
        if found := [one for one in experiment.differences(results) if one.seeds > 1]:
            console.print(for_terminal(differences_table(found, experiment.papers_differences())))
        say(f"in {out}: results.csv, results.json, results.parquet, condition.parquet, condition.png, condition.svg")


def _of_recipe(source: str, scale: str | None, rows: list[str] | None, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The runs of a recipe, and what they are about."""
    from wellcond.experiments.recipes import FULL, load_recipe
    from wellcond.experiments.results.experiment import Experiment

    options = {**asked}
    for name in ("norm", "head", "treat"):
        if name in options:
            values = listed(options[name])
            if len(values) > 1:
                raise ValueError(f"--{name} of a recipe is one for all its rows, got {', '.join(values)}")
            options[name] = values[0]
    recipe = load_recipe(source)
    if rows:
        recipe = recipe.with_rows(rows)
    seeds = options.pop("seed", None)
    configs = recipe.configs(scale or FULL, seeds, **options)
    words = ["--recipe", source, *(["--scale", scale] if scale else [])]
    words += [word for row in rows or [] for word in ("--rows", row)]
    words += [word for name, value in options.items() for word in option_words(name, value)]
    words += ["--seeds", str(seeds)] if seeds else []
    command = shlex.join(["wellcond", "compare", *words])
    return [config for row in configs.values() for config in row], Experiment.of_recipe(recipe, configs, command)


def _of_grid(asked: dict[str, Any], out: Path, resume: bool) -> tuple[Any, Any]:
    """The runs of a grid; or of whatever comparison is resumed without a word on what it is."""
    from wellcond.experiments.results.experiment import Experiment

    held = read_config(out, "comparison") if resume else {}
    described = held.get("experiment") or {}
    if (recipe := described.get("recipe")) is None:
        configs = _configs(asked, out, resume)
        return configs, Experiment.from_dict(described or None if not asked else None, configs)
    from wellcond.experiments.results.summary import configs_in

    configs = configs_in(held)
    experiment = Experiment.from_dict(described, configs)
    if set(asked) - {"seed"}:
        raise ValueError(
            f"'{out}' holds recipe '{recipe}': beside --resume give --recipe {recipe} with all of its options, or "
            "nothing but --seeds"
        )
    if "seed" in asked:
        rows = dict.fromkeys(replace(config, seed=0) for config in configs)
        configs = [replace(config, seed=seed) for config in rows for seed in range(asked["seed"])]
    return configs, experiment


def _configs(asked: dict[str, Any], out: Path, resume: bool) -> list[RunConfig]:
    """The grid as asked; what is not asked of a comparison that is resumed is as it holds it."""
    axes: dict[str, Any] = {"norm": ["batch", "zca"], "head": ["avg"], "treat": list(DEFAULT_TREATS), "seed": range(2)}
    shared: dict[str, Any] = {}
    if resume:
        from wellcond.experiments.results.summary import configs_in

        held = configs_in(read_config(out, "comparison"))
        if not asked:
            return held
        treatable = [config for config in held if is_treatable(config.norm, config.head)]
        axes = {
            name: list(dict.fromkeys(getattr(config, name) for config in (name == "treat" and treatable) or held))
            for name in axes
        }
        shared = {name: value for name, value in held[0].to_dict().items() if name not in axes}
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
