"""Whether a row of the table differs from the one it is compared with: paired by seed, with SciPy.

Two runs of one seed have the same images in the same order and start from weights drawn alike, so that their difference
varies less than the errors do. Its interval is from the bootstrap (Efron's BCa), its p-value from the t-test; the
p-values of a table are corrected together for the false discovery rate (Benjamini and Hochberg, 1995). Condition
numbers are compared in the same way, by their logarithms.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from wellcond.experiments.results.table import percent
from wellcond.experiments.run.result import RunResult

LEVEL = 0.05
"""At which a difference counts as seen; intervals cover 1 − LEVEL."""
FEWEST = 3
"""Seeds of which there is an interval: of two the bootstrap knows nothing but the two."""
POWER = 0.8
"""With which so many seeds as are said to be needed would see a difference."""
RESAMPLES = 9999

Measure = Callable[[RunResult], float]
"""What of a run is compared."""
ERROR: Measure = operator.attrgetter("test_error")


class Difference(NamedTuple):
    """Of the test error (a fraction), or another measure, of one row from another's, over the seeds that both have."""

    row: str
    against: str
    seeds: int
    mean: float
    std: float  # sample standard deviation, nan of one seed
    low: float  # of the interval, nan where it cannot be told
    high: float
    p: float  # corrected, nan where it cannot be told

    @property
    def is_seen(self) -> bool:
        """Whether it is outside of the noise: p-value and interval both say so."""
        return self.p < LEVEL and (self.low > 0 or self.high < 0)

    def verdict(self, papers: float) -> str:
        """On the difference that the paper reports (in percent): whether it is there in these runs.

        `not seen` says that a difference of that size is outside of the interval, so that it would have been seen.
        """
        if self.is_seen:
            return "seen" if self.mean * papers > 0 else "the opposite is seen"
        if math.isnan(self.low) or self.low <= papers / 100 <= self.high:
            return "not decidable"
        return "not seen"

    def sentence(self, papers: float | None = None) -> str:
        """In a line; ``papers`` is the difference that the paper reports, in percent."""
        points = percent(abs(self.mean))
        side = "lower" if self.mean < 0 else "higher"
        apart = f"as high as {self.against}" if float(points) == 0 else f"{points} points {side} than {self.against}"
        noise = "" if self.is_seen else ", which is within the noise" if self.seeds > 1 else "; one seed tells nothing"
        said = f"{self.row}: {apart}{noise}"
        if papers is None:
            return said
        needed = seeds_needed(self.std, papers / 100)
        if needed is None:
            return f"{said}; the paper's is {signed(papers / 100)}"
        return f"{said}; to see the paper's {signed(papers / 100)} it would take {needed} seeds"


def signed(fraction: float) -> str:
    """In percentage points, with its sign."""
    return f"{'−' if fraction < 0 else '+'}{percent(abs(fraction))}"


def differences(
    groups: Mapping[str, Sequence[RunResult]], against: Mapping[str, str], measure: Measure = ERROR
) -> list[Difference]:
    """For each row of ``against``, the difference from the row that it names; rows without a common seed at which both
    are finite are left out.

    Complexity: 9,999 resamples a row, some milliseconds.
    """
    from scipy import stats

    found = []
    for row, other in against.items():
        if row not in groups or other not in groups:
            continue
        its, others = ({run.config.seed: measure(run) for run in groups[name]} for name in (row, other))
        values = [its[seed] - others[seed] for seed in its if seed in others]
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
    if std <= 1e-12:  # errors are counts: a tie says nothing of how much they vary
        return Difference(row, against, n, mean, 0.0, math.nan, math.nan, math.nan)
    p: float = stats.ttest_1samp(values, 0.0)[1]  # pyright: ignore[reportAssignmentType]
    if n < FEWEST:
        return Difference(row, against, n, mean, std, math.nan, math.nan, float(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCa of very few values is degenerate, which the nan says
        interval = stats.bootstrap(
            (values,), np.mean, confidence_level=1 - LEVEL, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        ).confidence_interval
    return Difference(row, against, n, mean, std, float(interval.low), float(interval.high), float(p))


def seeds_needed(std: float, difference: float, most: int = 10_000) -> int | None:
    """How many paired seeds see a true difference, where pairs vary by ``std``, in POWER of all cases at LEVEL.

    From the power of the two-sided paired t-test (noncentral t). None where the spread is not known, where there is no
    difference, or where it takes more than ``most``.

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
