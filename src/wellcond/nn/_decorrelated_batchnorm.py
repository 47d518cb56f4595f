"""Decorrelated batch norm for any number of spatial dimensions: the arguments, the forward pass and its checks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wellcond._shared.checks import checks_values
from wellcond._shared.precision import full_precision, working_dtype
from wellcond.linalg import Solver, WhiteningMethod

from ._base import Observation
from ._least_ridge import mean_ridge
from ._running_statistics import Running, RunningWhitening
from ._sync import joined_moments, processes
from ._whitening_function import affine_map, moments

if TYPE_CHECKING:
    from typing_extensions import Self


class _DecorrelatedBatchNorm(RunningWhitening):
    """The layer; a subclass says for which dimensions. See :class:`DecorrelatedBatchNorm2d`."""

    _dims: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        solver: str | Solver = "auto",
        running: Running = "covariance",
        sync: bool = False,
        method: WhiteningMethod = "zca",
        relative: bool = False,
        process_group: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, groups, eps, momentum, track_running_stats, solver, running, method, relative, device, dtype
        )
        self.affine, self.sync, self.process_group = affine, sync, process_group
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self._warned = False
        self.reset_parameters()

    @classmethod
    def from_batchnorm(cls, batchnorm: nn.modules.batchnorm._BatchNorm, **options: Any) -> Self:
        """The layer that takes over from a batch norm: its affine parameters, its running variance on the diagonal.

        Args:
            batchnorm: a ``torch.nn.BatchNorm*d`` or ``SyncBatchNorm``; left as it is.
            options: arguments of this class, in place of those of the batch norm.
        """
        state = batchnorm.state_dict()
        own = {name: getattr(batchnorm, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        if isinstance(batchnorm, nn.SyncBatchNorm):
            own |= {"sync": True, "process_group": batchnorm.process_group}
        for tensor in state.values():
            if tensor.is_floating_point():
                own |= {"device": tensor.device, "dtype": tensor.dtype}
        layer = cls(batchnorm.num_features, **{**own, **options})
        layer.load_state_dict(state)
        return layer.train(batchnorm.training)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and the affine parameters to 1 and 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        with full_precision(x):
            if self.training or self.running_mean is None:
                return self._by_batch_statistics(x)
            mean = self.running_mean.view(self.groups, -1, 1)
            return affine_map(x, *self._affine(self._running_whitening(), mean, working_dtype(x.dtype)))

    def _by_batch_statistics(self, x: Tensor) -> Tensor:
        count = x.shape[0] * x.shape[2:].numel()
        together = self.sync and self.training and processes(self.process_group) > 1
        if not together:
            self._check_count(count, x)
        mean, cov, passes = moments(x, self.groups)
        if together:
            mean, cov, count = joined_moments(mean, cov, count, self.process_group)
            if checks_values(count):
                self._check_count(int(count), x)
        whitening = self._whitening(cov)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), cov.detach(), whitening.detach(), count)
        away = mean if passes.origin is None else mean - passes.origin
        return affine_map(x, *self._affine(whitening, away, cov.dtype), passes)

    def _affine(self, whitening: Tensor, mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W (G, d, d) and b (G, d, 1) with y = W x + b."""
        W, mean = whitening.to(dtype), mean.to(dtype)
        if self.weight is None or self.bias is None:
            return W, -(W @ mean)
        W = self.weight.to(dtype).view(self.groups, -1, 1) * W
        return W, self.bias.to(dtype).view(self.groups, -1, 1) - W @ mean

    def evaluation_map(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The affine map that the layer is in evaluation: (C, C/groups, 1, …) weight of a convolution and its bias (C).

        Args:
            dtype: of both; that of the running statistics, in which the whitening matrix is computed, if None.

        Raises:
            RuntimeError: the layer keeps no running statistics.
        """
        if self.running_mean is None:
            raise RuntimeError(f"{self.describe()} keeps no running statistics: its output depends on the batch")
        mean = self.running_mean
        W, b = self._affine(self._running_whitening(), mean.view(self.groups, -1, 1), dtype or mean.dtype)
        return W.flatten(0, 1).view(self.num_features, -1, *(1,) * (self._dims[-1] - 2)), b.flatten()

    def observed_features(self, x: Tensor) -> Observation:
        """(G, d, M) of (N, C, *spatial), in the working dtype: a copy; ε is what the ridge of this batch amounts to."""
        self._check_input(x)
        grouped = x.detach().to(working_dtype(x.dtype)).unflatten(1, (self.groups, -1))
        features = grouped.flatten(3).permute(1, 2, 0, 3).flatten(2) if x.dim() > 2 else grouped.permute(1, 2, 0)
        _, cov, _ = moments(x.detach(), self.groups)
        return Observation(features, mean_ridge(cov, self.eps, relative=self.relative))

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"expected input of a real floating dtype (got {x.dtype})")
        if x.dim() not in self._dims:
            expected = " or ".join(f"{dim}D" for dim in self._dims)
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected input with {self.num_features} channels (got {x.shape[1]} channels, shape {tuple(x.shape)})"
            )

    def _check_count(self, count: int, x: Tensor) -> None:
        d = self.num_features // self.groups
        if count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} "
                f"in {self.describe()}"
            )
        if count <= d and not self._warned:
            self._warned = True
            C = self.num_features
            enough = next(g for g in range(self.groups, C + 1) if C % g == 0 and C // g < count)
            warnings.warn(
                f"{self.describe()}: {count} values per channel give a covariance of rank at most {count - 1} for "
                f"{d} channels; eps={self.eps} keeps it finite, but take more samples or groups={enough} or more",
                stacklevel=5,
            )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, groups={self.groups}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, solver={self.solver!r}, "
            f"running={self.running!r}, sync={self.sync}, method={self.method!r}, relative={self.relative}"
        )
