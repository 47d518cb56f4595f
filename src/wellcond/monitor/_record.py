"""One record: the conditioning of a layer's covariance at one step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wellcond.linalg import covariance_spectrum


@dataclass(frozen=True)
class ConditionRecord:
    """The conditioning of the covariance P of one layer at one step.

    If a layer has several matrices (one per group or image), each field is their (lower) median unless noted otherwise.
    """

    step: int  #: completed steps before this forward pass
    layer: str  #: the layer's name in the model
    kappa: float  #: κ(P) without ε; infinite when ``numerical_rank < dim``
    kappa_eps: float  #: κ(P + εI), as seen by the solver
    kappa_range: float  #: κ over the numerical range of P
    numerical_rank: int  #: eigenvalues above ``rank_tolerance``; -1 if the features were not finite (other fields: NaN)
    rank_tolerance: float  #: bound on the eigenvalues caused by rounding of the features alone
    effective_rank: float  #: (tr P)²/tr P²
    eig_max: float  #: largest eigenvalue
    eig_min: float  #: smallest eigenvalue; rounding noise if below ``rank_tolerance``
    eps: float  #: the layer's absolute ε
    dim: int  #: d, the order of P
    samples: int  #: n, the number of samples of P
    matrices: int  #: matrices in the layer, of which at most ``max_matrices`` are examined
    kappa_max: float  #: the largest κ(P) of those examined
    failures: int  #: failed decompositions since the last record of this layer
    retries: int  #: matrices recovered by a fall-back since then
    #: ‖W_new − W_old‖_F/‖W_old‖_F of the preceding layer's weight in the step before the record (the maximum over
    #: several layers); 0 before the first step, NaN if unknown
    rotation: float = math.nan

    def as_dict(self) -> dict[str, int | float | str]:
        """The fields by name, in order."""
        return asdict(self)

    def scalars(self, tag: str = "condition") -> dict[str, float]:
        """The measures under their logged names: ``condition/LAYER/kappa`` …"""
        known = [name for name in MEASURES if name != "rotation" or not math.isnan(self.rotation)]
        return {f"{tag}/{self.layer}/{name}": getattr(self, name) for name in known}

    @property
    def finite(self) -> bool:
        """Whether the features were finite. κ may be infinite, but is NaN only for non-finite features."""
        return self.kappa == self.kappa and self.kappa_max == self.kappa_max


def alarms(record: ConditionRecord, kappa_above: float) -> list[str]:
    """The reasons for an alarm about this record, one sentence each."""
    layer, step, kappa = record.layer, record.step, record.kappa_max
    reasons = []
    if not record.finite:
        reasons.append(f"the features of '{layer}' are not finite at step {step}")
    if kappa > kappa_above:
        reasons.append(f"κ of '{layer}' is {kappa:.3e} at step {step}, above {kappa_above:.3e}")
    if record.failures > 0:
        reasons.append(f"{record.failures} decompositions of '{layer}' failed before step {step}")
    return reasons


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(ConditionRecord))
MEASURES = ("kappa", "kappa_eps", "kappa_range", "numerical_rank", "effective_rank", "eig_max", "eig_min", "rotation")
"""The fields that can be plotted over the steps."""


def records_of(state: Mapping[str, Any]) -> list[ConditionRecord]:
    """The records in a monitor's saved state, which holds one column per field known at the time."""
    columns = state["records"]
    return [ConditionRecord(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def medians(records: Iterable[ConditionRecord]) -> dict[str, float]:
    """The median of every measure in :data:`MEASURES` over the records with finite features; NaN if there are none.

    Example:
        >>> medians([])["kappa"]
        nan
    """
    finite = [record for record in records if record.finite]
    columns = {name: [getattr(record, name) for record in finite] for name in MEASURES}
    columns["rotation"] = [record.rotation for record in finite if record.step and not math.isnan(record.rotation)]
    return {name: statistics.median(values) if values else math.nan for name, values in columns.items()}


def measure(
    features: Tensor,
    eps: float,
    max_matrices: int,
    step: int,
    layer: str,
    failures: int,
    retries: int,
    rotation: float = math.nan,
) -> ConditionRecord:
    """The record of ``features`` (..., d, n), from at most ``max_matrices`` matrices evenly spaced in the batch."""
    d, n = features.shape[-2:]
    features = features.detach().reshape(-1, d, n)
    matrices = features.shape[0]
    if matrices > max_matrices:
        chosen = torch.linspace(0, matrices - 1, max_matrices).round().long()
        features = features[chosen.to(features.device)]
    spectrum = covariance_spectrum(features)
    finite = torch.isfinite(spectrum.tolerance)

    def median(values: Tensor) -> float:
        return values.double().masked_fill(~finite, torch.nan).median().item()

    kappas = spectrum.condition_number().masked_fill(~finite, torch.nan)
    rank = median(spectrum.numerical_rank)
    return ConditionRecord(
        step=step,
        layer=layer,
        kappa=median(kappas),
        kappa_eps=median(spectrum.condition_number(eps)),
        kappa_range=median(spectrum.range_condition_number()),
        numerical_rank=int(rank) if rank == rank else -1,
        rank_tolerance=median(spectrum.tolerance),
        effective_rank=median(spectrum.effective_rank),
        eig_max=median(spectrum.eigvals[..., 0]),
        eig_min=median(spectrum.eigvals[..., -1]),
        eps=float(eps),
        dim=d,
        samples=n,
        matrices=matrices,
        kappa_max=kappas.max().item(),
        failures=failures,
        retries=retries,
        rotation=rotation,
    )
