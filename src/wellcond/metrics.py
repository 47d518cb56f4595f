"""Condition number and effective rank of features as metrics of torchmetrics: over many batches and all processes.

They are of the covariance of everything that was seen since the last ``reset``, not means over batches: of a batch that
is smaller than the number of channels κ(P) is infinite, of the whole epoch it need not be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torchmetrics import Metric
except ImportError as _error:
    raise ImportError("wellcond.metrics needs torchmetrics: pip install 'wellcond[metrics]'") from _error

from wellcond._shared.checks import require_nonnegative
from wellcond._shared.moments import Moments
from wellcond._shared.precision import working_dtype
from wellcond.linalg import Spectrum, matrix_spectrum

__all__ = ["ConditionNumber", "EffectiveRank"]


class _OfTheCovariance(Metric):
    """Number, mean and scatter of the features as states that are merged, not added, over processes."""

    is_differentiable: bool | None = False
    full_state_update: bool | None = True
    samples: Tensor
    mean: Tensor
    scatter: Tensor
    mean_square: Tensor
    resolution: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features must be a positive whole number, got {num_features!r}")
        self.num_features = num_features
        zero = torch.zeros((), dtype=torch.float64)
        for name, state in {**Moments.empty(num_features)._asdict(), "mean_square": zero, "resolution": zero}.items():
            self.add_state(name, default=state, dist_reduce_fx=None)

    def update(self, features: Tensor) -> None:
        """Take features in: (N, C) or (N, C, *spatial) as a layer gets them, every position a sample.

        Raises:
            ValueError: another number of channels, an integer dtype, NaN or infinity.
        """
        if features.ndim < 2 or features.shape[1] != self.num_features or not features.is_floating_point():
            raise ValueError(
                f"features must be floating, (N, {self.num_features}) or (N, {self.num_features}, *spatial); "
                f"got {features.dtype} of shape {tuple(features.shape)}"
            )
        X = features.detach().movedim(1, -1).reshape(-1, self.num_features)
        if not torch.isfinite(X).all():
            raise ValueError("features have NaN or infinity")
        new = Moments.of(X)
        self.samples, self.mean, self.scatter = Moments(self.samples, self.mean, self.scatter).merged(new)
        self.mean_square = self.mean_square.maximum(X.double().square().sum() / max(len(X), 1))
        eps = torch.finfo(working_dtype(X.dtype)).eps
        self.resolution = self.resolution.maximum(self.resolution.new_tensor(eps))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take in what another metric of the same kind has seen, given as the metric or as its states by name."""
        if isinstance(incoming_state, Metric):
            if not isinstance(incoming_state, _OfTheCovariance) or incoming_state.num_features != self.num_features:
                raise ValueError(f"cannot merge {incoming_state} into {self} of {self.num_features} features")
            incoming_state = incoming_state.metric_state
        theirs = Moments(*(incoming_state[name].to(self.samples.device) for name in Moments._fields))
        self.samples, self.mean, self.scatter = Moments(self.samples, self.mean, self.scatter).merged(theirs)
        for name in ("mean_square", "resolution"):
            setattr(self, name, getattr(self, name).maximum(incoming_state[name].to(self.samples.device)))
        self._update_count += 1
        self._computed = None

    def spectrum(self) -> Spectrum:
        """Of the covariance so far, of all processes when called from ``compute``; eigenvalues that the rounding of the
        features explains are at or below its tolerance."""
        parts = zip(self.samples.reshape(-1), self.mean.reshape(-1, self.num_features), self._scatters(), strict=True)
        moments = Moments.empty(self.num_features)
        for part in parts:
            moments = moments.merged(Moments(*(one.cpu() for one in part)))
        if moments.samples == 0:
            raise ValueError("no features yet: call update first")
        found = matrix_spectrum(moments.covariance)
        rounding = self.resolution.max().cpu().square() * self.mean_square.max().cpu()
        return found._replace(tolerance=found.tolerance.maximum(rounding))

    def _scatters(self) -> Tensor:
        return self.scatter.reshape(-1, self.num_features, self.num_features)


class ConditionNumber(_OfTheCovariance):
    """κ(P + εI) of the covariance of all features seen, over batches and processes (eq. (1)).

    Args:
        num_features: C, the channels of the features.
        eps: ε ≥ 0; without it a covariance that is singular to the rounding of the features has κ = inf.
        kwargs: of :class:`torchmetrics.Metric`, such as ``process_group``.

    ``update`` takes features (N, C) or (N, C, *spatial) of any floating dtype; ``compute`` gives () float64.

    Raises:
        ValueError: features of another shape, not floating or not finite; ``compute`` before any of them.

    Complexity: a product of N·C² multiplications in float64 a batch, C² numbers of memory; O(C³) in ``compute``.
    The covariance is formed, so that κ beyond 1e14 is infinite (:class:`~wellcond.monitor.ConditionMonitor` looks at
    single batches, and further).

    Example:
        >>> import torch
        >>> metric = ConditionNumber(2)
        >>> metric.update(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]))
        >>> metric.update(torch.tensor([[3.0, -1.0], [-3.0, -1.0]]))
        >>> metric.compute()
        tensor(9., dtype=torch.float64)
    """

    higher_is_better: bool | None = False

    def __init__(self, num_features: int, *, eps: float = 0.0, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        require_nonnegative(eps, "eps")
        self.eps = eps

    def compute(self) -> Tensor:
        return self.spectrum().condition_number(self.eps).to(self.samples.device)


class EffectiveRank(_OfTheCovariance):
    """The participation ratio (tr P)²/tr P² of the covariance of all features seen, over batches and processes.

    Args:
        num_features: C, the channels of the features.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes features (N, C) or (N, C, *spatial) of any floating dtype; ``compute`` gives () float64 between 1
    and C, and 0 of features that do not vary.

    Raises:
        ValueError: features of another shape, not floating or not finite; ``compute`` before any of them.

    Complexity: as :class:`ConditionNumber`. Source: Roy and Vetterli, EUSIPCO 2007, with the Rényi entropy of order 2.

    Example:
        >>> import torch
        >>> metric = EffectiveRank(2)
        >>> metric(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]))
        tensor(2., dtype=torch.float64)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        return self.spectrum().effective_rank.to(self.samples.device)
