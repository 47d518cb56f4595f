"""One line of the record: what a layer's covariance was like at one step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from wellcond.linalg import covariance_spectrum


@dataclass(frozen=True)
class ConditionRecord:
    """The covariance P of one layer at one step. Of several matrices in a layer (groups, or one an image) each
    field is the median, the lower one of an even number, except where it says otherwise.

    Attributes:
        step: steps finished before this forward pass.
        layer: the layer's name in the model.
        kappa: κ(P) without ε; infinite when ``numerical_rank < dim``.
        kappa_eps: κ(P + εI), which the solver sees.
        kappa_range: κ over the numerical range of P.
        numerical_rank: eigenvalues above ``rank_tolerance``; -1 where the features were not finite (else NaN).
        rank_tolerance: the largest eigenvalue that rounding of the features alone can make.
        effective_rank: (tr P)²/tr P².
        eig_max: largest eigenvalue.
        eig_min: smallest eigenvalue; rounding noise where it is below ``rank_tolerance``.
        eps: the layer's absolute ε.
        dim: d, the order of P.
        samples: n, the samples behind P.
        matrices: matrices in the layer, of which at most ``max_matrices`` were looked at.
        kappa_max: the largest κ(P) of those looked at.
        failures: decompositions that failed since the last record of this layer.
        retries: matrices that a fall-back saved since then.
    """

    step: int
    layer: str
    kappa: float
    kappa_eps: float
    kappa_range: float
    numerical_rank: int
    rank_tolerance: float
    effective_rank: float
    eig_max: float
    eig_min: float
    eps: float
    dim: int
    samples: int
    matrices: int
    kappa_max: float
    failures: int
    retries: int

    def as_dict(self) -> dict[str, int | float | str]:
        """The fields by name, in order."""
        return asdict(self)

    def scalars(self, tag: str = "condition") -> dict[str, float]:
        """The measures by the names under which they are logged: ``condition/LAYER/kappa`` …"""
        return {f"{tag}/{self.layer}/{name}": getattr(self, name) for name in MEASURES}

    @property
    def finite(self) -> bool:
        """Whether the features were finite: κ may well be infinite, it is NaN only where they were not."""
        return self.kappa == self.kappa and self.kappa_max == self.kappa_max


def alarms(record: ConditionRecord, kappa_above: float) -> list[str]:
    """What is alarming about a record, in words."""
    reasons = []
    if not record.finite:
        reasons.append(f"the features of '{record.layer}' are not finite at step {record.step}")
    if record.kappa_max > kappa_above:
        reasons.append(
            f"κ of '{record.layer}' is {record.kappa_max:.3e} at step {record.step}, above {kappa_above:.3e}"
        )
    if record.failures:
        reasons.append(f"{record.failures} decompositions of '{record.layer}' failed before step {record.step}")
    return reasons


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(ConditionRecord))
MEASURES = ("kappa", "kappa_eps", "kappa_range", "numerical_rank", "effective_rank", "eig_max", "eig_min")
"""The fields that make a curve over the steps."""


def medians(records: Iterable[ConditionRecord]) -> dict[str, float]:
    """The median of every measure in :data:`MEASURES` over the records with finite features; NaN without any.

    Example:
        >>> medians([])["kappa"]
        nan
    """
    finite = [record for record in records if record.finite]
    return {
        name: statistics.median(getattr(record, name) for record in finite) if finite else math.nan for name in MEASURES
    }


def measure(
    features: Tensor, eps: float, *, step: int, layer: str, max_matrices: int, failures: int, retries: int
) -> ConditionRecord:
    """The record of ``features`` (..., d, n): of at most ``max_matrices`` matrices, evenly spread over the batch."""
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
    )
