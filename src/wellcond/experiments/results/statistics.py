"""Differences between rows of a comparison and their significance: paired by seed, with SciPy.

Runs with the same seed see the same images in the same order and start from the same random weights, so that their
difference varies less than the errors. Intervals and p-values are those of the paired t-test (Student, 1908); p-values
are corrected over a table for the false discovery rate (Benjamini and Hochberg, 1995). Condition numbers are compared
in the same way, by their logarithms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from wellcond.experiments.results.table import percent

LEVEL = 0.05
"""Significance level; intervals cover 1 − LEVEL."""
POWER = 0.8
"""Statistical power at which the number of needed seeds is computed."""
MIN_PAIRS = 3
"""For a number of needed seeds: the deviation of two pairs is wrong by more than a factor of 2 in 43 % of cases."""

ValueOf = Callable[[Any], float]
"""Gives the compared value of a run, whose configuration has a seed; nan if it was not measured."""
test_error: ValueOf = operator.attrgetter("test_error")


class Difference(NamedTuple):
    """The difference of a value (by default the test error, a fraction) between two rows, over their common seeds."""

    row: str
    against: str
    seeds: int  # with a finite value in both rows; mean and std are over these
    mean: float  # nan for none
    std: float  # sample standard deviation, nan below two
    low: float  # of the t interval, which is of this row alone; nan if undefined
    high: float
    p: float  # corrected over the rows of the table, nan if undefined
    infinite: int = 0  # further common seeds, at which a value is infinite: then there is no interval and no p
    rows: int = 1  # of the table

    @property
    def pairs(self) -> int:
        """Common seeds at which both rows were measured."""
        return self.seeds + self.infinite

    @property
    def is_seen(self) -> bool:
        """Whether it is significant; the interval is then without 0."""
        return self.p < LEVEL

    def verdict(self, papers: float) -> str:
        """Whether these runs show the paper's difference (in percent).

        `not seen` means that it lies outside the interval. A difference of zero cannot be seen, nor be missing.
        """
        if self.is_seen:
            if papers == 0:
                return "a difference is seen"
            return "seen" if self.mean * papers > 0 else "the opposite is seen"
        if papers == 0 or math.isnan(self.low) or self.low <= papers / 100 <= self.high:
            return "not decidable"
        return "not seen"

    def seeds_for(self, papers: float) -> int | None:
        """How many seeds would detect the paper's difference (in percent) in this table; None if that is unknown.

        An upper bound: the level is divided by the number of rows (Bonferroni), and every difference that is
        significant then is so after the correction for the false discovery rate.
        """
        return seeds_needed(self.std, papers / 100, self.rows) if self.seeds >= MIN_PAIRS else None

    def sentence(self, papers: float | None = None) -> str:
        """The difference in words; ``papers`` is the paper's difference in percent."""
        points = percent(abs(self.mean))
        side = "lower" if self.mean < 0 else "higher"
        comparison = f"{points} points {side} than" if float(points) else "as high as"
        text = f"{self.row}: {comparison} {self.against}"
        if not self.is_seen:
            text += ", which is within the noise" if self.seeds > 1 else "; one seed tells nothing"
        if papers is None:
            return text
        needed = self.seeds_for(papers)
        if needed is None:
            return f"{text}; the paper's is {signed(papers / 100)}"
        return f"{text}; to see the paper's {signed(papers / 100)} it would take at most {needed} seeds"


def signed(fraction: float) -> str:
    """A fraction in percentage points, with sign."""
    return f"{'−' if fraction < 0 else '+'}{percent(abs(fraction))}"


def differences(
    groups: Mapping[str, Sequence[Any]], against: Mapping[str, str], value_of: ValueOf = test_error
) -> list[Difference]:
    """The difference of each row in ``against`` from its baseline; rows without a common seed at which both were
    measured are omitted.

    Raises:
        ValueError: a row has two runs of the same seed.
    """
    from scipy import stats

    found = []
    for row, other in against.items():
        if row in groups and other in groups:
            values, baseline = (_by_seed(name, groups[name], value_of) for name in (row, other))
            if pairs := [(value, baseline[seed]) for seed, value in values.items() if seed in baseline]:
                found.append(_difference(row, other, pairs))
    tested = [index for index, one in enumerate(found) if not math.isnan(one.p)]
    corrected = stats.false_discovery_control([found[index].p for index in tested]) if tested else []
    for index, p in zip(tested, corrected, strict=True):
        found[index] = found[index]._replace(p=float(p))
    return [one._replace(rows=len(found)) for one in found]


def _by_seed(row: str, runs: Sequence[Any], value_of: ValueOf) -> dict[int, float]:
    """The measured values of a row."""
    found: dict[int, float] = {}
    for run in runs:
        if run.config.seed in found:
            raise ValueError(f"row '{row}' has two runs of seed {run.config.seed}; give one of them")
        found[run.config.seed] = value_of(run)
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def _difference(row: str, against: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    import numpy as np
    from scipy import stats

    values = [value - other for value, other in pairs if math.isfinite(value) and math.isfinite(other)]
    n, infinite = len(values), len(pairs) - len(values)
    mean = float(np.mean(values)) if values else math.nan
    std = float(np.std(values, ddof=1)) if n > 1 else math.nan
    untested = Difference(row, against, n, mean, std, math.nan, math.nan, math.nan, infinite)
    if infinite or n < 2:  # what is left of the pairs is selected by its value
        return untested
    if std <= 1e-12:  # errors are discrete: a tie says nothing about their variance
        return untested._replace(std=0.0)
    standard_error = std / math.sqrt(n)
    margin = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * standard_error
    p = 2 * float(stats.t.sf(abs(mean) / standard_error, n - 1))
    return untested._replace(low=mean - margin, high=mean + margin, p=p)


def seeds_needed(std: float, difference: float, rows: int = 1, most: int = 10_000) -> int | None:
    """The number of paired seeds that detect a true ``difference`` with POWER, if pairs vary by ``std``.

    From the power of the two-sided paired t-test at LEVEL / ``rows`` (noncentral t). None if ``std`` is unknown or
    zero, if there is no difference, or if it takes more than ``most``.

    Example:
        >>> seeds_needed(0.3, 0.5), seeds_needed(0.3, 0.5, rows=8)
        (6, 9)
    """
    from scipy import stats

    if not std > 0 or difference == 0:
        return None

    def power(n: int) -> float:
        # Only the tail on the side of the difference: SciPy's other one is nan for large differences.
        critical, shift = stats.t.ppf(1 - LEVEL / rows / 2, n - 1), abs(difference) / std * math.sqrt(n)
        return float(stats.nct.sf(critical, n - 1, shift))

    low, high = 2, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > 2 * most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low if low <= most else None
