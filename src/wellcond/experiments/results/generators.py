"""Tables of generators: what each row of a comparison measures, and its differences from the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from wellcond.experiments.latents.result import LatentsResult
from wellcond.experiments.results.statistics import Difference, differences
from wellcond.experiments.results.table import Column, Strong, Table, number, percent

Groups = Mapping[str, Sequence[LatentsResult]]
"""Runs by row."""


class Measure(NamedTuple):
    """A quantity of a run: how tables call it, which side is better (−1: small, 1: large), and its value."""

    name: str
    better: int
    value: Callable[[LatentsResult], float]


def _measured(name: str) -> Callable[[LatentsResult], float]:
    return lambda run: math.nan if run.measures is None else getattr(run.measures, name)


MEASURES = {
    "kappa_directions": Measure("log10 κ(U)", -1, lambda run: math.log10(run.kappa_directions)),
    "kappa_jacobian": Measure("log10 κ(J)", -1, lambda run: math.log10(run.kappa_jacobian)),
    "frechet_distance": Measure("Fréchet", -1, _measured("frechet_distance")),
    "path_length": Measure("path length", -1, _measured("path_length")),
    "mig": Measure("MIG", 1, _measured("mig")),
    "disentanglement": Measure("D", 1, _measured("disentanglement")),
    "completeness": Measure("C", 1, _measured("completeness")),
    "informativeness": Measure("I", 1, _measured("informativeness")),
}
"""What is compared; those of images need known factors."""

CAPTION = (
    "Means over the seeds ± sample standard deviation; the best of a column is bold. U: the directions, J: the "
    "Jacobian of the image by the latent variables. Fréchet distance and path length (small is better) are on features "
    "of a network that sees the factors; MIG, and disentanglement D, completeness C and informativeness I of DCI "
    "(large is better, at most 1), are from the latent variables to the factors that it sees."
)


def grouped(results: Iterable[LatentsResult], label: Callable[[Any], str]) -> dict[str, list[LatentsResult]]:
    """The runs by row, in the order of the results."""
    groups: dict[str, list[LatentsResult]] = {}
    for result in results:
        groups.setdefault(label(result.config), []).append(result)
    return groups


def generators_table(groups: Groups, title: str = "") -> Table:
    """A line for each row."""
    import numpy as np

    shown = {name: one for name, one in MEASURES.items() if any(map(math.isfinite, _all(groups, one)))}
    means = {
        name: {row: float(np.mean([*map(m.value, runs)])) for row, runs in groups.items()} for name, m in shown.items()
    }
    best = {name: max(means[name].values(), key=lambda value, m=m: m.better * value) for name, m in shown.items()}
    body = []
    for row, runs in groups.items():
        cells = []
        for name, measure in shown.items():
            values = [measure.value(run) for run in runs]
            text = f"{means[name][row]:.3g}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.2g}"
            cells.append(Strong(text) if means[name][row] == best[name] else text)
        olr = [run.shortened for run in runs if run.shortened is not None]
        cells += [
            f"{percent(float(np.mean(olr)))} %" if olr else "",
            number(float(np.median([r.seconds for r in runs]))),
        ]
        body.append([row, str(len(runs)), *cells])
    heads = ["method", "seeds", *(measure.name for measure in shown.values())]
    return Table(
        [*heads, Column("shortened", wide=True), Column("s a run", wide=True)], body, caption=CAPTION, title=title
    )


def _all(groups: Groups, measure: Measure) -> list[float]:
    return [measure.value(run) for runs in groups.values() for run in runs]


def differences_of_generators(groups: Groups, against: Mapping[str, str]) -> dict[str, list[Difference]]:
    """By measure: the difference of each row from its baseline, paired by seed; p-values are corrected over rows."""
    found = {name: differences(groups, against, one.value) for name, one in MEASURES.items()}
    return {name: those for name, those in found.items() if those}


def differences_table_of_generators(found: Mapping[str, Sequence[Difference]]) -> Table:
    """A line for each row and measure; what is seen is bold."""
    body = []
    for name, those in found.items():
        for one in those:
            interval = "" if math.isnan(one.low) else f"{one.low:+.3g} to {one.high:+.3g}"
            better = one.is_seen and one.mean * MEASURES[name].better > 0
            verdict = "within the noise" if not one.is_seen else "better" if better else "worse"
            row = [f"{one.row} − {one.against}", MEASURES[name].name, f"{one.mean:+.3g}", interval]
            row += ["" if math.isnan(one.p) else f"{one.p:.2g}", verdict]
            body.append([Strong(cell) for cell in row] if one.is_seen else row)
    return Table(
        ["difference", Column("of", text=True), "mean", "95 % interval", "p", Column("", text=True)],
        body,
        caption=(
            "Paired by seed. Intervals: bootstrap (BCa), from three seeds; p: paired t-test, corrected over the rows "
            "of one measure for the false discovery rate."
        ),
    )
