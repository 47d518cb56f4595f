"""`wellcond recipes`: the experiments that `compare --recipe` can run."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from wellcond.cli.options import Debug
from wellcond.cli.reporting import console, reporting, say


def recipes(
    show: Annotated[
        str | None, typer.Argument(metavar="[show]", help="show: print a recipe, to read or modify")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="its name, or a .toml file")] = None,
    debug: Debug = False,
) -> None:
    """List the paper's tables and figures, and further experiments, for compare --recipe; `show NAME` prints one."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.experiments.recipes import known_recipes, load_recipe, recipe_text
        from wellcond.experiments.results.recipes import recipes_table
        from wellcond.experiments.show.render import for_terminal

        if show is None:
            console.print(for_terminal(recipes_table([load_recipe(known) for known in known_recipes()])))
            say("to print one: wellcond recipes show NAME; to run it: wellcond compare --recipe NAME --scale small")
            return
        if show != "show" or name is None:
            raise ValueError(f"write wellcond recipes, or wellcond recipes show NAME ({', '.join(known_recipes())})")
        load_recipe(name)
        print(recipe_text(name), end="")
