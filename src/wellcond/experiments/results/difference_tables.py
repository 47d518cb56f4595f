"""Tables of the differences between rows of a comparison: of test errors, and of condition numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from wellcond._shared.names import listed
from wellcond.experiments.results.statistics import Difference, seeds_needed, signed
from wellcond.experiments.results.table import SPACE, Column, Strong, Table, number


def differences_table(found: Sequence[Difference], papers: Mapping[str, float] | None = None) -> Table:
    """A line for each row with a baseline; significant differences are bold.

    ``papers`` has the paper's difference by row, in percent; the verdict on it is omitted on the terminal.
    """
    papers = papers or {}

    def paper_cells(one: Difference) -> list[str]:
        if (theirs := papers.get(one.row)) is None:
            return ["", "", ""]
        needed = seeds_needed(one.std, theirs / 100)
        return [signed(theirs / 100), "" if needed is None else str(needed), one.verdict(theirs)]

    rows = [_cells(one, signed) for one in found]
    heads: list[str | Column] = ["method", Column("against", text=True, wide=True)]
    heads += ["points", f"95{SPACE}% interval", "p"]
    caption = (
        f"Test error minus that of {listed(dict.fromkeys(one.against for one in found))}, in percentage points: the "
        f"mean of {_seeds(found)} paired seeds, bold if significant (p below 0.05, and an interval without 0). "
        "Bootstrap intervals; p from the paired t-test, corrected for the false discovery rate."
    )
    if papers:
        rows = [[*cells, *paper_cells(one)] for cells, one in zip(rows, found, strict=True)]
        heads += ["paper's", f"seeds{SPACE}for it", Column("the paper's is", text=True, wide=True)]
        caption += (
            " Seeds for it: how many would detect the paper's difference with a power of 0.8. Not seen: it lies "
            "outside the interval."
        )
    return Table(heads, rows, caption=caption, title="differences")


def conditioning_table(found: Sequence[Difference]) -> Table:
    """The condition number of each row relative to its baseline; ``found`` has differences of common logarithms."""
    return Table(
        ["method", Column("against", text=True), "κ times", f"95{SPACE}% interval", "p"],
        [_cells(one, lambda decades: number(10.0**decades)) for one in found],
        caption=f"The condition number κ(P) of each run (median over its steps) relative to that of the other row: the "
        f"geometric mean of {_seeds(found)} paired seeds; otherwise as for the differences.",
        title="conditioning",
    )


def _cells(one: Difference, form: Callable[[float], str]) -> list[str]:
    """Row, baseline, mean, interval and p; empty if unknown."""
    mean = Strong(form(one.mean)) if one.is_seen else form(one.mean)
    interval = "" if math.isnan(one.low) else f"{form(one.low)} to {form(one.high)}"
    return [one.row, one.against, mean, interval, "" if math.isnan(one.p) else f"{one.p:.2g}"]


def _seeds(found: Sequence[Difference]) -> str:
    seeds = sorted({one.seeds for one in found})
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
