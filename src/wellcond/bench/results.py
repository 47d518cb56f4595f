"""The results of one case: what was measured of every contestant, and the ratios derived from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from wellcond.bench.cases import Case
from wellcond.bench.contestants import AUTO, REFERENCE
from wellcond.bench.gauges import Time

EIGH, EIGH_IN_THREADS, PRODUCTS = "eigh alone", "eigh alone, in threads", "five products alone"


@dataclass
class Measured:
    """One contestant on one case; values that could not be measured are None, and `failure` states why."""

    name: str
    ours: bool
    forward: Time | None = None  # without a graph
    both: Time | None = None  # forward and gradient of input and parameters
    saved: int | None = None  # bytes saved for backward
    peak: int | None = None  # bytes allocated at once, forward and backward
    error: float | None = None  # largest relative error over matrices (images for layers)
    gradient_error: float | None = None
    operations: int | None = None  # FLOPs forward and backward, if only matrix products
    failure: str = ""

    @property
    def operations_per_second(self) -> float | None:
        """FLOP/s of forward and backward, if only matrix products."""
        return self.operations / self.both.minimum if self.operations and self.both else None


@dataclass
class CaseResult:
    """All contestants on one case; `peak` is the FLOP/s of a large product timed alongside."""

    case: Case
    input_bytes: int
    rows: list[Measured]
    limits: dict[str, Time]
    peak: float

    def __getitem__(self, name: str) -> Measured:
        return next(row for row in self.rows if row.name == name)

    def faster(self, row: Measured, what: str = "both") -> float | None:
        """Speed relative to autograd through eigh."""
        mine, reference = getattr(row, what), getattr(self[REFERENCE], what)
        return reference.minimum / mine.minimum if mine and reference else None

    @property
    def overhead(self) -> float | None:
        """Time of `wellcond` relative to eigh plus five products, minus 1."""
        both = self[AUTO].both
        if not both or EIGH not in self.limits:
            return None
        eigh = min(self.limits[name].minimum for name in (EIGH, EIGH_IN_THREADS) if name in self.limits)
        return both.minimum / (eigh + self.limits[PRODUCTS].minimum) - 1

    def to_dict(self) -> dict[str, Any]:
        """All measurements and ratios, for the JSON file."""
        rows = []
        for row in self.rows:
            ratios = {"faster_forward": self.faster(row, "forward"), "faster_both": self.faster(row)}
            rows.append({**asdict(row), **ratios, "flops_per_second": row.operations_per_second})
        return {
            "task": self.case.task,
            "shape": list(self.case.shape),
            "input_bytes": self.input_bytes,
            "limits": {name: asdict(time) for name, time in self.limits.items()},
            "overhead_over_limit": self.overhead,
            "peak_flops_per_second": self.peak,
            "rows": rows,
        }
