"""Differences between rows of a comparison and their significance: paired by seed, with SciPy.

Runs with the same seed see the same images in the same order and start from the same random weights, so that their
difference varies less than the errors. Intervals are by the bootstrap (Efron's BCa), p-values by the paired t-test,
corrected over a table for the false discovery rate (Benjamini and Hochberg, 1995). Condition numbers are compared in
the same way, by their logarithms.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from wellcond.experiments.results.table import percent

LEVEL = 0.05
"""Significance level; intervals cover 1 − LEVEL."""
MIN_SEEDS = 3
"""For a bootstrap interval, which is meaningless for two values."""
POWER = 0.8
"""Statistical power at which the number of needed seeds is computed."""
RESAMPLES = 9999

Measure = Callable[[Any], float]
"""The compared quantity of a run, whose configuration has a seed."""
ERROR: Measure = operator.attrgetter("test_error")


class Difference(NamedTuple):
    """The difference of a measure (by default the test error, a fraction) between two rows, over their common seeds."""

    row: str
    against: str
    seeds: int
    mean: float
    std: float  # sample standard deviation, nan for one seed
    low: float  # of the interval, nan if undefined
    high: float
    p: float  # corrected, nan if undefined

    @property
    def is_seen(self) -> bool:
        """Whether it is significant by both the p-value and the interval."""
        return self.p < LEVEL and (self.low > 0 or self.high < 0)

    def verdict(self, papers: float) -> str:
        """Whether these runs show the paper's difference (in percent).

        `not seen` means that it lies outside the interval, so that it would have been detected.
        """
        if self.is_seen:
            if papers == 0:
                return "a difference is seen"
            return "seen" if self.mean * papers > 0 else "the opposite is seen"
        if math.isnan(self.low) or self.low <= papers / 100 <= self.high:
            return "not decidable"
        return "not seen"

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
        needed = seeds_needed(self.std, papers / 100)
        if needed is None:
            return f"{text}; the paper's is {signed(papers / 100)}"
        return f"{text}; to see the paper's {signed(papers / 100)} it would take {needed} seeds"


def signed(fraction: float) -> str:
    """A fraction in percentage points, with sign."""
    return f"{'−' if fraction < 0 else '+'}{percent(abs(fraction))}"


def differences(
    groups: Mapping[str, Sequence[Any]], against: Mapping[str, str], measure: Measure = ERROR
) -> list[Difference]:
    """The difference of each row in ``against`` from its baseline; rows without a common seed with finite values are
    omitted.

    Complexity: 9,999 resamples per row, a few milliseconds.
    """
    from scipy import stats

    found = []
    for row, other in against.items():
        if row not in groups or other not in groups:
            continue
        by_seed, baseline = ({run.config.seed: measure(run) for run in groups[name]} for name in (row, other))
        values = [value - baseline[seed] for seed, value in by_seed.items() if seed in baseline]
        if values := [value for value in values if math.isfinite(value)]:
            found.append(_difference(row, other, values))
    tested = [index for index, one in enumerate(found) if not math.isnan(one.p)]
    corrected = stats.false_discovery_control([found[index].p for index in tested]) if tested else []
    for index, p in zip(tested, corrected, strict=True):
        found[index] = found[index]._replace(p=float(p))
    return found


def _difference(row: str, against: str, values: Sequence[float]) -> Difference:
    import numpy as np
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Difference(row, against, n, mean, *[math.nan] * 4)
    std = float(np.std(values, ddof=1))
    if std <= 1e-12:  # errors are discrete: a tie says nothing about their variance
        return Difference(row, against, n, mean, 0.0, math.nan, math.nan, math.nan)
    p: float = stats.ttest_1samp(values, 0.0)[1]  # pyright: ignore[reportAssignmentType]
    if n < MIN_SEEDS:
        return Difference(row, against, n, mean, std, math.nan, math.nan, float(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCa can be degenerate for few values, and then gives nan
        interval = stats.bootstrap(
            (values,), np.mean, confidence_level=1 - LEVEL, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        ).confidence_interval
    return Difference(row, against, n, mean, std, float(interval.low), float(interval.high), float(p))


def seeds_needed(std: float, difference: float, most: int = 10_000) -> int | None:
    """The number of paired seeds that detect a true ``difference`` with POWER at LEVEL, if pairs vary by ``std``.

    From the power of the two-sided paired t-test (noncentral t). None if ``std`` is unknown or zero, if there is no
    difference, or if it takes more than ``most``.

    Example:
        >>> seeds_needed(0.3, 0.5)
        6
    """
    from scipy import stats

    if not std > 0 or difference == 0:
        return None

    def power(n: int) -> float:
        critical, shift = stats.t.ppf(1 - LEVEL / 2, n - 1), abs(difference) / std * math.sqrt(n)
        return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))

    low, high = 2, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > 2 * most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low if low <= most else None
