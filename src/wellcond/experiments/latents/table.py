"""The result of one generator as a table."""

from __future__ import annotations

from dataclasses import fields

from wellcond.experiments.latents.result import LatentsResult, Measures
from wellcond.experiments.results.table import Column, Strong, Table, number, percent

NAMES = {
    "frechet_distance": "Fréchet distance",
    "path_length": "path length",
    "mig": "MIG",
    "disentanglement": "disentanglement (DCI)",
    "completeness": "completeness (DCI)",
    "informativeness": "informativeness (DCI)",
    "observer": "factors from real images",
}
"""How tables call the measures."""


def generator_table(result: LatentsResult) -> Table:
    """One line per quantity."""
    lines = [
        ("κ(U), largest", number(result.kappa_directions)),
        ("κ of the Jacobian", number(result.kappa_jacobian)),
    ]
    if result.shortened is not None:
        lines.append(("steps shortened by olr", f"{percent(result.shortened)} %"))
    if result.measures is not None:
        lines += [(NAMES[one.name], number(getattr(result.measures, one.name))) for one in fields(Measures)]
    lines.append(("time", f"{result.seconds:.1f} s for {result.steps} steps, {result.seconds_per_step:.4f} s a step"))
    config = result.config
    return Table(
        ["", Column("", text=True)],
        [(Strong(what), value) for what, value in lines],
        title=f"{config.label} on {config.data}; seed {config.seed}, {config.steps} steps",
    )
