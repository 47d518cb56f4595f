"""Decorrelated batch norm for any number of spatial dimensions: options, checks and the training pass."""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from wellcond._shared.checks import checks_values
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import is_exporting, run_in_python
from wellcond.linalg import NewtonSchulz, Solver, WhiteningMethod, recording, whitening_matrix
from wellcond.linalg.solvers import choose_solver

from ._base import Observation, SpectralModule, require_input, symbolic_call
from ._derived import Derived
from ._evaluation import EvaluationMap
from ._fused_passes import (
    PassContext,
    Whitening,
    affine_map,
    geometry_of,
    measure,
    moments,
    needs_plain_operations,
    whiten,
)
from ._inverse_root import inverse_root
from ._minimum_ridge import mean_ridge, varying, without_constants
from ._range import by_channel, leaves_range, require_squares, unit_of_features
from ._running_statistics import Running
from ._sync import joined_moments, processes

SHOWN = "groups", "eps", "momentum", "affine", "track_running_stats", "solver", "running", "sync", "method", "relative"


class _DecorrelatedBatchNorm(EvaluationMap):
    """The layer without its number of dimensions. See :class:`DecorrelatedBatchNorm2d`.

    A training pass is one autograd function (`_fused`) in the usual case, and a chain of several in the others.
    """

    batchnorm_eps: float = 1e-5  # of the batch norm that it replaced, for to_plain
    num_features: int
    groups: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    solver: str | Solver
    running: Running
    method: WhiteningMethod
    relative: bool
    sync: bool
    process_group: Any
    weight: nn.Parameter | None
    bias: nn.Parameter | None

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
        SpectralModule.__init__(self)  # not that of BatchNorm, which registers a running variance
        _require_groups(type(self).__name__, num_features, groups)
        require_known(running, get_args(Running), "running statistics")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be positive, got {eps}")
        whitening_matrix(torch.eye(1, device="cpu"), method=method, solver=solver)  # raises if the two do not fit
        if running == "whitening" and method == "pca":
            raise ValueError(
                "running='whitening' averages matrices whose rows method='pca' reorders from batch to batch: take "
                "running='covariance', or method 'zca' or 'cholesky'"
            )
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.solver, self.running, self.relative = solver, running, relative
        self.method = method
        self.sync, self.process_group = sync, process_group
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self._register_statistics(device, dtype)
        self._derived = Derived()
        self._warned = False
        self.reset_parameters()

    @classmethod
    def from_batchnorm(cls, batchnorm: BatchNorm, **options: Any) -> Self:
        """A layer with the affine parameters of a batch norm, and its running variance on the diagonal.

        Args:
            batchnorm: a ``torch.nn.BatchNorm*d`` or ``SyncBatchNorm``; it is not changed.
            options: arguments of this class, which override those of the batch norm.
        """
        state = {name: value for name, value in batchnorm.state_dict().items() if "." not in name}  # no submodule's
        own = {name: getattr(batchnorm, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        if isinstance(batchnorm, nn.SyncBatchNorm):
            own |= {"sync": True, "process_group": batchnorm.process_group}
        for tensor in state.values():
            if tensor.is_floating_point():
                own |= {"device": tensor.device, "dtype": tensor.dtype}
        layer = cls(batchnorm.num_features, **{**own, **options})
        layer.batchnorm_eps = batchnorm.eps
        layer.load_state_dict(state)
        return layer.train(batchnorm.training)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and the affine parameters to 1 and 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if (node := symbolic_call(self, x)) is not None:
            return node
        if self._breaks_graph():
            return run_in_python(_DecorrelatedBatchNorm.forward, self, x)
        self._check_input(x)
        with full_precision(x):
            if self.training or self.running_mean is None:
                return self._normalise_by_batch(x)
            W, b = self._running_affine(working_dtype(x.dtype))
            return affine_map(x, W, b)

    def _is_traceable(self) -> bool:
        by_products = self.method == "zca" and choose_solver(self.solver).traceable
        return by_products or not (self.training or self.running_mean is None)

    def _normalise_by_batch(self, x: Tensor) -> Tensor:
        count = x.shape[0] * math.prod(x.shape[2:])
        together = self.sync and self.training and processes(self.process_group) > 1
        if not together:
            self._check_count(count, x)
            if self.method == "zca" and not self.relative and not needs_plain_operations(x):
                y = self._fused(x, count)
                if y is not None:
                    return y
        x, unit, mean, cov, context = self._moments(x, alone=not together)
        if together:
            mean, cov, count = joined_moments(mean, cov, count, self.process_group)
            cov = without_constants(cov, mean)
            if checks_values(count):
                self._check_count(int(count), x)
        whitening = self._whitening(cov)
        if self.training and self.track_running_stats:
            with torch.no_grad():
                self._track(mean.detach(), cov.detach(), whitening.detach(), count, unit)
        W, b = self._affine(whitening, context.from_origin(mean), cov.dtype, self.weight, self.bias)
        return affine_map(x, W, b, context)

    def _fused(self, x: Tensor, count: int) -> Tensor | None:
        """The usual case as a single autograd function; None if the values need the general one (near the ends of the
        range of the dtype). Nothing is traced or transformed here, see ``needs_plain_operations``."""
        with torch.no_grad():
            moments = measure(x, geometry_of(x, self.groups), reading=checks_values(x))
            mean, cov, numbers = moments.mean, moments.cov, moments.numbers
            constants = grows = True
            if numbers is not None:
                limit, rounding = torch.finfo(cov.dtype).max ** 0.5, torch.finfo(cov.dtype).eps
                if not numbers.highest < limit or (not numbers.lowest > 1 / limit and leaves_range(cov)):
                    return None
                smallest = rounding * numbers.mean
                constants = numbers.lowest <= smallest * smallest  # a power would raise an error if it overflows
                grows = rounding * cov.shape[-1] * numbers.highest > self.eps
            kept = varying(cov, mean) if constants else None
            if kept is not None:
                cov.mul_(kept)
            solver = choose_solver(self.solver, cov)
            way = inverse_root(solver, self.eps, grows=grows, reading=numbers is not None)
            with recording(self.solver_events, self.describe):
                root, saved = way.forward(cov)
            if self.training and self.track_running_stats:
                self._track(mean, cov, root, count)
        whitening = Whitening(root, saved, way.adjoint, kept, self._differentiable)
        return whiten(x, self.weight, self.bias, moments, whitening)

    def _differentiable(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output of a training pass by operations that can be differentiated twice; changes no state."""
        x, _, mean, cov, context = self._moments(x)
        W, b = self._affine(self._whitening(cov), context.from_origin(mean), cov.dtype, weight, bias)
        return affine_map(x, W, b, context)

    def _moments(self, x: Tensor, *, alone: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor, PassContext]:
        """c x with a factor c for each group, c (G, 1, 1) or None for 1, and the moments of c x."""
        mean, cov, context = moments(x, self.groups)
        unit = None
        if alone and leaves_range(cov):  # with several processes an error in one would leave the others waiting
            if self.relative:
                unit = unit_of_features(x, mean)
                x = by_channel(x, unit)
                mean, cov, context = moments(x, self.groups)
            require_squares(x, cov, self.describe)
        return x, unit, mean, without_constants(cov, mean), context

    def observed_features(self, x: Tensor) -> Observation:
        """(G, d, M) of (N, C, *spatial), in the working dtype, and the ε that the ridge of this batch amounts to."""
        self._check_input(x)
        channels = x.detach().to(working_dtype(x.dtype)).transpose(0, 1).flatten(1)
        _, unit, _, cov, _ = self._moments(x.detach())
        eps = mean_ridge(cov, self.eps, relative=self.relative, unit=unit)
        return Observation(channels.unflatten(0, (self.groups, -1)), eps)

    def meaning(self) -> dict[str, Any]:
        """Methods differ by a rotation of the output, which later layers have learned; solvers only by their error.

        A damped iteration (:class:`IterNorm2d`) is another normalisation for each number of steps.
        """
        solver = self.solver
        if isinstance(solver, NewtonSchulz) and solver.tolerance is None:
            return {"method": self.method, "steps": solver.steps}
        return {"method": self.method}

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"expected input of a real floating dtype (got {x.dtype})")
        require_input(x, self._dims, self.num_features)

    def _check_count(self, count: int, x: Tensor) -> None:
        d = self.num_features // self.groups
        if count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} "
                f"in {self.describe()}"
            )
        # In an exported graph this comparison would become a bound on the batch size.
        if not self._warned and not is_exporting() and count <= d:
            self._warned = True
            C = self.num_features
            enough = next(g for g in range(self.groups, C + 1) if C % g == 0 and C // g < count)
            warnings.warn(
                f"{self.describe()}: {count} values per channel give a covariance of rank at most {count - 1} for "
                f"{d} channels; eps={self.eps} keeps it finite, but take more samples or groups={enough} or more",
                stacklevel=6,
            )

    def extra_repr(self) -> str:
        return ", ".join([str(self.num_features), *(f"{name}={getattr(self, name)!r}" for name in SHOWN)])


def _require_groups(layer: str, num_features: int, groups: int) -> None:
    """Raise unless ``groups`` divides the channels; it may be the ε that a batch norm takes in this place."""
    if isinstance(groups, bool) or not isinstance(groups, Integral):
        hint = f"; for ε, the second argument of a batch norm, write eps={groups}" if isinstance(groups, float) else ""
        raise TypeError(f"the second argument of {layer} is groups, an integer, got {groups!r}{hint}")
    if num_features < 1 or groups < 1 or num_features % groups:
        raise ValueError(
            f"num_features must be divisible by groups, got num_features={num_features} and groups={groups}"
        )
