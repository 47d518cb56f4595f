"""Centred features, exactly 0 in constant channels.

The computed mean of n equal numbers has a rounding error, and so has every difference from it; dividing these by their
size would turn rounding into features. A channel counts as constant if its variance is at most that of the rounding,
(eps·mean)².
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_samples(X: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The mean (..., d, 1) of X (..., d, n) over the chosen samples (..., 1, n), accurate to one rounding."""
    mean = _mean(X, chosen)
    return mean + _mean(X - mean, chosen)  # the mean of the differences is the error of the first


def centred(X: Tensor, mean: Tensor, chosen: Tensor | None = None) -> Tensor:
    """X − mean, 0 in the samples that are not chosen and in channels that are constant over the chosen ones."""
    A = X - mean
    if chosen is not None:
        A = torch.where(chosen, A, 0.0)
    # Relative to the mean, so that no square overflows; with a zero mean no difference is rounding.
    deviation = _mean((A.detach() / mean.detach()).abs().square(), chosen)
    return torch.where(deviation <= torch.finfo(A.dtype).eps ** 2, 0.0, A)


def _mean(X: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is None:
        return X.mean(-1, keepdim=True)
    return torch.where(chosen, X, 0.0).sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True).clamp_min(1)
