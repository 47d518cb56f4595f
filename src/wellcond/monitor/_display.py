"""Records as a table of text, as a sparkline and as a figure."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wellcond._shared.names import aligned

from ._record import ConditionRecord

_BARS = "▁▂▃▄▅▆▇█"
_NAMES = {
    "kappa": "condition number κ(P)",
    "kappa_eps": "condition number κ(P + εI)",
    "kappa_range": "condition number over the numerical range",
    "eig_max": "largest eigenvalue of P",
    "eig_min": "smallest eigenvalue of P",
    "rotation": "relative change of the preceding weight in one step",
}
_COLUMNS = ("kappa", "kappa_eps", "numerical_rank", "effective_rank", "dim", "records", "failures", "retries")


class Summary(str):
    """Statistics as text. Indexing it like the dictionary of earlier versions still works, with a warning."""

    _statistics: dict[str, dict[str, float]]

    def __new__(cls, statistics: dict[str, dict[str, float]]) -> Summary:
        rows = [["layer", *_COLUMNS], *([layer, *(f"{s[c]:.4g}" for c in _COLUMNS)] for layer, s in statistics.items())]
        text = super().__new__(cls, aligned(rows))
        text._statistics = statistics
        return text

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        warnings.warn("summary() is now text; use statistics() for the numbers", DeprecationWarning, stacklevel=2)
        return self._statistics[key]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last ``width`` values on a log scale as bars; ``∞`` for infinity, ``?`` for NaN."""
    values = values[-width:]
    logs = [math.log10(v) for v in values if 0 < v < math.inf]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def bar(value: float) -> str:
        if value != value:
            return "?"
        if value == math.inf:
            return "∞"
        height = (math.log10(value) - low) / (high - low) if high > low else 0.0
        return _BARS[min(int(height * len(_BARS)), len(_BARS) - 1)]

    return "".join(map(bar, values))


def plot(series: dict[str, list[ConditionRecord]], target: Any, measure: str) -> Any:
    """Plot ``measure`` over the steps on a log axis, one line per layer, onto matplotlib axes or to a file."""
    axes, figure = target, None
    if isinstance(target, (str, os.PathLike)):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'wellcond[train]'") from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
    for layer, records in series.items():
        # A log axis cannot show infinite or unknown values: they leave a gap.
        heights = [v if math.isfinite(v) else math.nan for v in (float(getattr(r, measure)) for r in records)]
        gaps = sum(map(math.isnan, heights))
        label = f"{layer or 'model'} (not finite at {gaps} of {len(heights)})" if gaps else layer or "model"
        axes.plot([r.step for r in records], heights, label=label, marker=".", markersize=3)
    axes.set(yscale="log", xlabel="step", ylabel=_NAMES.get(measure, measure.replace("_", " ")))
    axes.legend()
    if figure is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)
    return axes
