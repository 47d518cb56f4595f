"""Differences between the rows of a comparison, as tables: of the test errors, and of the condition numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from wellcond._shared.names import listed
from wellcond.experiments.results.statistics import Difference, seeds_needed, signed
from wellcond.experiments.results.table import SPACE, Column, Strong, Table, number


def differences_table(found: Sequence[Difference], papers: Mapping[str, float] | None = None) -> Table:
    """A line for each row that is compared with another; bold where they differ by more than the noise.

    ``papers`` has by row the difference that the paper reports, in percent; whether it is seen here is told where there
    is room.
    """
    papers = papers or {}

    def cells(one: Difference) -> list[str]:
        interval = "" if math.isnan(one.low) else f"{signed(one.low)} to {signed(one.high)}"
        points = signed(one.mean)
        return [
            one.row,
            one.against,
            Strong(points) if one.is_seen else points,
            interval,
            _p(one),
            *(of_paper(one) if papers else []),
        ]

    def of_paper(one: Difference) -> list[str]:
        if (theirs := papers.get(one.row)) is None:
            return ["", "", ""]
        needed = seeds_needed(one.std, theirs / 100)
        return [signed(theirs / 100), "" if needed is None else str(needed), one.verdict(theirs)]

    heads: list[str | Column] = ["method", Column("against", text=True, wide=True)]
    heads += ["points", f"95{SPACE}% interval", "p"]
    if papers:
        heads += ["paper's", f"seeds{SPACE}for it", Column("the paper's is", text=True, wide=True)]
    return Table(
        heads,
        [cells(one) for one in found],
        caption=f"Test error less that of {listed(dict.fromkeys(one.against for one in found))}, in percentage points: "
        f"the mean of {_seeds(found)} paired seeds, bold where it is outside of the noise (p below 0.05 and an "
        "interval without 0). Intervals by the bootstrap, p by the paired t-test, corrected for the false discovery "
        "rate."
        + (
            " Seeds for it: how many would see the paper's difference in 4 of 5 cases. Not seen: "
            "it would lie outside of the interval."
            if papers
            else ""
        ),
        title="differences",
    )


def conditioning_table(found: Sequence[Difference]) -> Table:
    """By what factor a row's condition number is another's; ``found`` has the differences of the common logarithms."""

    def factor(decades: float) -> str:
        return number(10.0**decades)

    def cells(one: Difference) -> list[str]:
        interval = "" if math.isnan(one.low) else f"{factor(one.low)} to {factor(one.high)}"
        return [
            one.row,
            one.against,
            Strong(factor(one.mean)) if one.is_seen else factor(one.mean),
            interval,
            _p(one),
        ]

    return Table(
        ["method", Column("against", text=True), "κ times", f"95{SPACE}% interval", "p"],
        [cells(one) for one in found],
        caption=f"The condition number κ(P) of each run (median over its steps) as a multiple of the other row's: the "
        f"geometric mean of {_seeds(found)} paired seeds; the rest as in the differences.",
        title="conditioning",
    )


def _p(one: Difference) -> str:
    return "" if math.isnan(one.p) else f"{one.p:.2g}"


def _seeds(found: Sequence[Difference]) -> str:
    seeds = sorted({one.seeds for one in found})
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
