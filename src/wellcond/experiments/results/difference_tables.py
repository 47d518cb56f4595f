"""Tables of the differences between rows of a comparison: of test errors, and of condition numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from wellcond._shared.names import listed
from wellcond.experiments.results.statistics import LEVEL, MIN_PAIRS, POWER, Difference, signed
from wellcond.experiments.results.table import SPACE, Column, Strong, Table, number

INFINITE = (
    "Where κ is infinite at a seed, in either row, the mean is of the other seeds, which are better conditioned, and "
    "has no interval and no p."
)


def differences_table(found: Sequence[Difference], papers: Mapping[str, float] | None = None) -> Table:
    """A line for each row with a baseline; significant differences are bold.

    ``papers`` has the paper's difference by row, in percent; the verdict on it is omitted on the terminal.
    """
    papers = papers or {}

    def paper_cells(one: Difference) -> list[str]:
        if (theirs := papers.get(one.row)) is None:
            return ["", "", ""]
        needed = one.seeds_for(theirs)
        return [signed(theirs / 100), "" if needed is None else str(needed), one.verdict(theirs)]

    rows = [_cells(one, signed) for one in found]
    heads: list[str | Column] = ["method", Column("against", text=True, wide=True)]
    heads += ["points", f"95{SPACE}% interval", "p"]
    caption = (
        f"Test error minus that of {listed(dict.fromkeys(one.against for one in found))}, in percentage points: the "
        f"mean of {_seeds(found)} paired seeds, bold if significant (p below {LEVEL}). Interval and p are those of the "
        "paired t-test; p is corrected over the rows for the false discovery rate, the intervals are not."
    )
    if papers:
        rows = [[*cells, *paper_cells(one)] for cells, one in zip(rows, found, strict=True)]
        heads += ["paper's", f"seeds{SPACE}for it", Column("the paper's is", text=True, wide=True)]
        caption += (
            f" Seeds for it: how many would detect the paper's difference with a power of {POWER} at the level "
            f"{LEVEL} / {len(found)} (Bonferroni over the rows, so at most that many), from {MIN_PAIRS} seeds on. Not "
            "seen: it lies outside the interval."
        )
    return Table(heads, rows, caption=caption, title="differences")


def conditioning_table(found: Sequence[Difference], over_range: bool = False) -> Table:
    """The condition number of each row relative to its baseline; ``found`` has differences of common logarithms, of
    κ(P) or of that over the numerical range of P."""
    kappa = "condition number κ(P)"
    if over_range:
        kappa = "condition number over the numerical range of P (κ(P) is infinite, as P lacks full rank)"
    caption = (
        f"The {kappa} of each run (median over its steps) relative to that of the other row: the "
        f"geometric mean of {_seeds(found)} paired seeds; interval and p as for the differences, of the logarithms."
    )
    if any(one.infinite for one in found):
        caption += f" {INFINITE}"
    return Table(
        ["method", Column("against", text=True), "κ times", f"95{SPACE}% interval", "p"],
        [_cells(one, lambda decades: number(10.0**decades)) for one in found],
        caption=caption,
        title="conditioning",
    )


def _cells(one: Difference, form: Callable[[float], str]) -> list[str]:
    """Row, baseline, mean, interval and p; empty if unknown."""
    mean = Strong(form(one.mean)) if one.is_seen else "" if math.isnan(one.mean) else form(one.mean)
    interval = "" if math.isnan(one.low) else f"{form(one.low)} to {form(one.high)}"
    if one.infinite:
        interval = f"κ infinite in {one.infinite} of {one.pairs}"
    return [one.row, one.against, mean, interval, "" if math.isnan(one.p) else f"{one.p:.2g}"]


def _seeds(found: Sequence[Difference]) -> str:
    seeds = sorted({one.pairs for one in found})
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
