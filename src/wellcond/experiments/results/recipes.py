"""The recipes as a table, apart from the tables of runs, which need Lightning to be loaded."""

from __future__ import annotations

from collections.abc import Sequence

from wellcond.experiments.recipes import Recipe
from wellcond.experiments.results.table import SPACE, Column, Table


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """A line for each: its title, rows, seeds and scales."""
    heads = ["recipe", Column(f"what{SPACE}it{SPACE}is", text=True), "rows", "seeds", Column("scales", text=True)]
    rows = [(r.name, r.title, str(len(r.rows)), str(r.seeds), ", ".join(["full", *r.scales])) for r in recipes]
    return Table(heads, rows, title="recipes")
