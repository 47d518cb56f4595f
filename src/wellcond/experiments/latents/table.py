"""The result of one generator as a table."""

from __future__ import annotations

import math

from wellcond.experiments.latents.quantities import QUANTITIES
from wellcond.experiments.latents.result import LatentsResult
from wellcond.experiments.results.table import Column, Strong, Table, number, percent


def generator_table(result: LatentsResult) -> Table:
    """One line per quantity."""
    values = {one.name: one.value(result) for one in QUANTITIES.values()}
    lines = [(name, number(value)) for name, value in values.items() if not math.isnan(value)]
    if result.shortened is not None:
        lines.append(("steps shortened by olr", f"{percent(result.shortened)} %"))
    lines.append(("time", f"{result.seconds:.1f} s for {result.steps} steps, {result.seconds_per_step:.4f} s a step"))
    config = result.config
    return Table(
        ["", Column("", text=True)],
        [(Strong(what), value) for what, value in lines],
        title=f"{config.label} on {config.data}; seed {config.seed}, {config.steps} steps",
    )
