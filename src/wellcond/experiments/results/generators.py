"""Tables of generators: what each row of a comparison measures, and its differences from the baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from wellcond.experiments.latents.quantities import COMPARED
from wellcond.experiments.latents.result import LatentsResult
from wellcond.experiments.results.difference_tables import INFINITE
from wellcond.experiments.results.statistics import LEVEL, Difference, differences
from wellcond.experiments.results.table import SPACE, Column, Strong, Table, number, percent

Groups = Mapping[str, Sequence[LatentsResult]]
"""Runs by row."""

CAPTION = (
    "Means over the seeds ± sample standard deviation, or inf and at how many seeds it is infinite; the best of a "
    "column is bold. Everything is measured on the averaged weights. U: the directions, J: the Jacobian of the image "
    "by the latent variables. Fréchet distance and path length (small is better) are on features of a network that "
    "sees the factors; MIG, and disentanglement D, completeness C and informativeness I of DCI (large is better, at "
    "most 1), are from the latent variables to the factors that it sees."
)


def grouped(results: Iterable[LatentsResult], label: Callable[[Any], str]) -> dict[str, list[LatentsResult]]:
    """The runs by row, in the order of the results."""
    groups: dict[str, list[LatentsResult]] = {}
    for result in results:
        groups.setdefault(label(result.config), []).append(result)
    return groups


def generators_table(groups: Groups, title: str = "") -> Table:
    """A line for each row, with the quantities that were measured."""
    values = {
        name: {row: [one.compared(run) for run in runs] for row, runs in groups.items()}
        for name, one in COMPARED.items()
    }
    shown = {name: rows for name, rows in values.items() if not all(map(math.isnan, itertools.chain(*rows.values())))}
    means = {name: {row: fmean(found) for row, found in rows.items()} for name, rows in shown.items()}
    best = {name: _best(means[name].values(), COMPARED[name].better) for name in shown}
    body = []
    for row, runs in groups.items():
        cells = []
        for name, rows in shown.items():
            text = _mean(rows[row])
            cells.append(Strong(text) if means[name][row] == best[name] else text)
        olr = [run.shortened for run in runs if run.shortened is not None]
        cells += [
            f"{percent(fmean(olr))} %" if olr else "",
            number(median(run.seconds for run in runs)),
        ]
        body.append([row, str(len(runs)), *cells])
    heads = ["method", "seeds", *(COMPARED[name].head for name in shown)]
    return Table(
        [*heads, Column("shortened", wide=True), Column("s a run", wide=True)], body, caption=CAPTION, title=title
    )


def _best(means: Iterable[float], better: int) -> float | None:
    return max((mean for mean in means if math.isfinite(mean)), key=lambda mean: better * mean, default=None)


def _mean(values: Sequence[float]) -> str:
    """Mean and deviation of the seeds, or at how many of them it is infinite."""
    if infinite := sum(map(math.isinf, values)):
        return f"inf ({infinite} of {len(values)})"
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.3g}{deviation}"


def differences_of_generators(groups: Groups, against: Mapping[str, str]) -> dict[str, list[Difference]]:
    """By quantity: the difference of each row from its baseline, paired by seed; p-values are corrected over rows."""
    found = {name: differences(groups, against, one.compared) for name, one in COMPARED.items()}
    return {name: those for name, those in found.items() if those}


def differences_table_of_generators(found: Mapping[str, Sequence[Difference]]) -> Table:
    """A line for each row and quantity; what is seen is bold."""
    body = []
    for name, those in found.items():
        for one in those:
            interval = "" if math.isnan(one.low) else f"{one.low:+.3g} to {one.high:+.3g}"
            better = one.is_seen and one.mean * COMPARED[name].better > 0
            verdict = "within the noise" if not one.is_seen else "better" if better else "worse"
            if one.infinite:
                interval = f"infinite in {one.infinite} of {one.pairs}"
                verdict = "not decidable"
            mean = "" if math.isnan(one.mean) else f"{one.mean:+.3g}"
            row = [f"{one.row} − {one.against}", COMPARED[name].head, mean, interval]
            row += ["" if math.isnan(one.p) else f"{one.p:.2g}", verdict]
            body.append([Strong(cell) for cell in row] if one.is_seen else row)
    caption = (
        f"Paired by seed; bold if significant (p below {LEVEL}). Interval and p are those of the paired t-test; p is "
        "corrected over the rows of one quantity for the false discovery rate, the intervals are not."
    )
    if any(one.infinite for those in found.values() for one in those):
        caption += f" {INFINITE}"
    return Table(
        ["difference", Column("of", text=True), "mean", f"95{SPACE}% interval", "p", Column("", text=True)],
        body,
        caption=caption,
    )
