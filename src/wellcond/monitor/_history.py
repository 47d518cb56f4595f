"""Reading the records of a monitor: by layer, as statistics, as text and as a figure."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from wellcond._shared.names import listed

from . import _display
from ._record import MEASURES, ConditionRecord, medians


class ConditionHistory:
    """The records of the monitored layers. A subclass fills ``layers`` and ``records``."""

    layers: dict[str, nn.Module]
    records: list[ConditionRecord]

    def _unrecorded_events(self, layer: str) -> tuple[int, int]:
        """Failures and retries of the layer's solver since its last record."""
        raise NotImplementedError

    def of(self, layer: str) -> list[ConditionRecord]:
        """The records of one layer."""
        if layer not in self.layers:
            raise KeyError(f"layer '{layer}' is not monitored; monitored layers: {listed(self.layers)}")
        return [record for record in self.records if record.layer == layer]

    def statistics(self) -> dict[str, dict[str, float]]:
        """For each recorded layer, the median of every measure over its records, and counts.

        Records with non-finite features are counted in ``nonfinite`` and excluded from the medians and ``kappa_max``.
        ``failures`` and ``retries`` include those since the last record.
        """
        result: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            if records := self.of(layer):
                finite = [record for record in records if record.finite]
                failures, retries = self._unrecorded_events(layer)
                result[layer] = medians(finite) | {
                    "kappa_max": max((r.kappa_max for r in finite), default=math.nan),
                    "dim": records[-1].dim,
                    "records": len(records),
                    "nonfinite": len(records) - len(finite),
                    "failures": failures + sum(r.failures for r in records),
                    "retries": retries + sum(r.retries for r in records),
                }
        return result

    def summary(self) -> str:
        """:meth:`statistics` as a printable table, one line per layer."""
        return _display.Summary(self.statistics())

    def sparkline(self, layer: str | None = None, width: int = 12) -> str:
        """κ(P) of the last ``width`` records on a log scale as ``name 1.3e+04 ▁▂▃█``, one line per layer."""
        lines = []
        for name in self.layers if layer is None else [layer]:
            if records := self.of(name):
                kappas = [record.kappa for record in records]
                lines.append(f"{name} {kappas[-1]:.1e} {_display.sparkline(kappas, width)}".strip())
        return "\n".join(lines)

    def plot(self, target: Any, measure: str = "kappa") -> Any:
        """Plot ``measure`` over the steps, one line per layer, to a file (path) or onto matplotlib axes.

        Infinite values leave a gap; ``kappa_eps`` and ``kappa_range`` are always finite. Needs matplotlib; returns the
        axes.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got '{measure}'")
        return _display.plot({layer: self.of(layer) for layer in self.layers}, target, measure)
