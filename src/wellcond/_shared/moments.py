"""Mean and scatter matrix of samples that arrive in parts: kept in float64, merged without cancellation.

The merging formula is that of Chan, Golub and LeVeque, Algorithms for computing the sample variance (The American
Statistician, 1983): it never subtracts numbers as large as the squared mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Number, mean and scatter of samples of d channels.

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
        """The moments of no sample."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(zero, zero.expand(d).clone(), zero.expand(d, d).clone())

    @classmethod
    def of(cls, X: Tensor) -> Moments:
        """The moments of samples in rows, (n, d)."""
        X = X.detach().to(torch.float64)
        mean = X.mean(0) if len(X) else X.new_zeros(X.shape[1])
        centred = X - mean
        return cls(X.new_tensor(float(len(X))), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
        samples = self.samples + other.samples
        share = other.samples / samples.clamp_min(1.0)
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + (self.samples * share) * torch.outer(step, step)
        return Moments(samples, self.mean + share * step, scatter)

    @property
    def covariance(self) -> Tensor:
        """(d, d) with divisor n, exactly symmetric; zero without samples."""
        P = self.scatter / self.samples.clamp_min(1.0)
        return (P + P.T) / 2
