"""The recipes as a table; separate from the tables of runs, which import Lightning."""

from __future__ import annotations

from collections.abc import Sequence

from wellcond.experiments.recipes import Recipe
from wellcond.experiments.results.table import SPACE, Column, Table


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """One line per recipe: title, rows, seeds and scales."""
    heads = ["recipe", Column(f"what{SPACE}it{SPACE}is", text=True), "rows", "seeds", Column("scales", text=True)]
    rows = [(r.name, r.title, str(len(r.rows)), str(r.seeds), ", ".join(["full", *r.scales])) for r in recipes]
    return Table(heads, rows, title="recipes")
