"""Mean and scatter of samples that come in parts: kept in float64, merged without cancellation.

The merge is that of Chan, Golub and LeVeque, Algorithms for computing the sample variance (The American Statistician,
1983): nothing is subtracted that is of the size of the mean squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of so many samples of d channels.

    Attributes:
        samples: () float64, how many.
        mean: (d,) float64.
        scatter: (d, d) float64, Σ (x − mean)(x − mean)ᵀ.
    """

    samples: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, d: int) -> Moments:
        """Of no sample."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(zero, zero.expand(d).clone(), zero.expand(d, d).clone())

    @classmethod
    def of(cls, X: Tensor) -> Moments:
        """Of samples in rows, (n, d)."""
        X = X.detach().to(torch.float64)
        mean = X.mean(0) if len(X) else X.new_zeros(X.shape[1])
        centred = X - mean
        return cls(X.new_tensor(float(len(X))), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Of both sets of samples together."""
        samples = self.samples + other.samples
        share = other.samples / samples.clamp_min(1.0)
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + (self.samples * share) * torch.outer(step, step)
        return Moments(samples, self.mean + share * step, scatter)

    @property
    def covariance(self) -> Tensor:
        """(d, d) with the divisor n, symmetric; zero of no sample."""
        P = self.scatter / self.samples.clamp_min(1.0)
        return (P + P.T) / 2
