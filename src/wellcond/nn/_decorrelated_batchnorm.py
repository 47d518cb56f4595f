"""Decorrelated batch norm for any number of spatial dimensions: forward pass, running statistics and evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from wellcond._shared.checks import checks_values, readable, require_finite
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.names import require_known
from wellcond._shared.precision import HALF, full_precision, working_dtype
from wellcond._shared.torch_internals import (
    as_written,
    called_by,
    has_values,
    is_compiling,
    is_exporting,
    under_functorch,
)
from wellcond.linalg import NewtonSchulz, Solver, WhiteningMethod, recording, value_checks, whitening_matrix
from wellcond.linalg.solvers import choose_solver

from ._base import Observation, SpectralModule, require_input, symbolic_call
from ._derived import Derived
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
from ._migration import upgrade
from ._minimum_ridge import mean_ridge, varying, with_ridge, without_constants
from ._range import by_channel, leaves_range, require_squares, unit_of_covariances, unit_of_features
from ._sync import joined_moments, processes

if TYPE_CHECKING:
    from typing_extensions import Self

Running = Literal["covariance", "whitening"]
SHOWN = "groups", "eps", "momentum", "affine", "track_running_stats", "solver", "running", "sync", "method", "relative"

STATISTICS = "running_mean", "running_cov", "running_whitening", "evaluation_whitening", "num_batches_tracked"


class _DecorrelatedBatchNorm(SelfDescribing, BatchNorm, SpectralModule):
    """The layer; a subclass says for which dimensions. See :class:`DecorrelatedBatchNorm2d`.

    Of torch's base class it has the name, by which tools know what has running statistics, and the way to load a count.
    """

    _version = 2
    _dims: tuple[int, ...] = ()
    batchnorm_eps: float = 1e-5  # of the batch norm whose place it has, for to_plain
    running_mean: Tensor | None
    running_cov: Tensor | None
    running_whitening: Tensor | None
    evaluation_whitening: Tensor | None
    num_batches_tracked: Tensor | None

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
        SpectralModule.__init__(self)
        _require_groups(type(self).__name__, num_features, groups)
        require_known(running, get_args(Running), "running statistics")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be positive, got {eps}")
        whitening_matrix(torch.eye(1, device="cpu"), method=method, solver=solver)  # refuses what does not go together
        if running == "whitening" and method == "pca":
            raise ValueError(
                "running='whitening' averages matrices whose rows method='pca' reorders from batch to batch: take "
                "running='covariance', or method 'zca' or 'cholesky'"
            )
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.solver, self.running, self.relative = solver, running, relative
        self.method: WhiteningMethod = method
        self.sync, self.process_group = sync, process_group
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
        self._register_statistics(device, dtype)
        self._warned = False
        self.reset_parameters()

    @classmethod
    def from_batchnorm(cls, batchnorm: BatchNorm, **options: Any) -> Self:
        """The layer that takes over from a batch norm: its affine parameters, its running variance on the diagonal.

        Args:
            batchnorm: a ``torch.nn.BatchNorm*d`` or ``SyncBatchNorm``; left as it is.
            options: arguments of this class, in place of those of the batch norm.
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

    @property
    def running_var(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The diagonal (C,) of the running covariance, for tools that reset or show it; a variance that is assigned
        becomes the whole of it."""
        if called_by("convert_sync_batchnorm"):  # which would put a plain SyncBatchNorm here
            raise RuntimeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm does not know {type(self).__name__}: take "
                "wellcond.nn.convert_sync(model, batchnorm=True), which converts both kinds, and with it drop "
                "Trainer(sync_batchnorm=True)"
            )
        return None if self.running_cov is None else self.running_cov.diagonal(dim1=-2, dim2=-1).flatten()

    @running_var.setter
    def running_var(self, variance: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        cov = self.running_cov
        if cov is not None:
            self.running_cov = None if variance is None else torch.diag_embed(variance.view(cov.shape[:-1])).to(cov)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and the affine parameters to 1 and 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if (node := symbolic_call(self, x)) is not None:
            return node
        if self.breaks_graph():
            return as_written(_DecorrelatedBatchNorm.forward, self, x)
        self._check_input(x)
        with full_precision(x):
            if self.training or self.running_mean is None:
                return self._by_batch_statistics(x)
            mean = self.running_mean.view(self.groups, -1, 1)
            W, b = self._affine(self._running_whitening(), mean, working_dtype(x.dtype), self.weight, self.bias)
            return affine_map(x, W, b)

    def _is_traceable(self) -> bool:
        by_products = self.method == "zca" and choose_solver(self.solver).traceable
        return by_products or not (self.training or self.running_mean is None)

    def _by_batch_statistics(self, x: Tensor) -> Tensor:
        count = x.shape[0] * math.prod(x.shape[2:])
        together = self.sync and self.training and processes(self.process_group) > 1
        if not together:
            self._check_count(count, x)
            if self.method == "zca" and not self.relative and not needs_plain_operations(x):
                y = self._at_once(x, count)
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
            self._track(mean.detach(), cov.detach(), whitening.detach(), count, unit)
        W, b = self._affine(whitening, context.from_origin(mean), cov.dtype, self.weight, self.bias)
        return affine_map(x, W, b, context)

    def _at_once(self, x: Tensor, count: int) -> Tensor | None:
        """The usual case by a single autograd function; None for values that are to be looked at more closely."""
        with torch.no_grad():
            moments = measure(x, geometry_of(x, self.groups), reading=readable(x))
            mean, cov, numbers = moments.mean, moments.cov, moments.numbers
            constants = grows = True
            if numbers is not None:
                limit, rounding = torch.finfo(cov.dtype).max ** 0.5, torch.finfo(cov.dtype).eps
                if not numbers.highest < limit or (not numbers.lowest > 1 / limit and leaves_range(cov)):
                    return None
                constants = numbers.lowest <= (rounding * numbers.mean) ** 2
                grows = rounding * cov.shape[-1] * numbers.highest > self.eps
            kept = varying(cov, mean) if constants else None
            if kept is not None:
                cov.mul_(kept)
            solver = choose_solver(self.solver, cov)
            way = inverse_root(solver, self.eps, grows=grows, reading=numbers is not None)
            with self._recording(self.solver):
                root, saved = way.forward(cov)
            if self.training and self.track_running_stats:
                self._track(mean, cov, root, count)
        whitening = Whitening(root, saved, way.adjoint, kept, self._in_steps)
        return whiten(x, self.weight, self.bias, moments, whitening)

    def _in_steps(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output of a training step, nothing of which is kept."""
        x, _, mean, cov, context = self._moments(x)
        W, b = self._affine(self._whitening(cov), context.from_origin(mean), cov.dtype, weight, bias)
        return affine_map(x, W, b, context)

    def _moments(self, x: Tensor, *, alone: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor, PassContext]:
        """c x with factors c by group, c itself (G, 1, 1), None where it is 1, and the moments of c x."""
        mean, cov, context = moments(x, self.groups)
        unit = None
        if alone and leaves_range(cov):  # a process that refuses its share would let the others wait for it
            if self.relative:
                unit = unit_of_features(x, mean)
                x = by_channel(x, unit)
                mean, cov, context = moments(x, self.groups)
            require_squares(x, cov, self.describe)
        return x, unit, mean, without_constants(cov, mean), context

    def _whitening(self, cov: Tensor) -> Tensor:
        """The whitening matrices of covariances (G, d, d); errors name the layer."""
        unit = None
        if self.relative and leaves_range(cov):
            unit = unit_of_covariances(cov)
            cov = unit * cov * unit
        cov, eps = with_ridge(cov, self.eps, relative=self.relative)
        with self._recording(self.solver):
            W = whitening_matrix(cov, eps=eps, method=self.method, relative=self.relative, solver=self.solver)
        return W if unit is None else W * unit

    def _affine(
        self, whitening: Tensor, mean: Tensor, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """W (G, d, d) and b (G, d, 1) with y = W x + b."""
        W, mean = whitening.to(dtype), mean.to(dtype)
        if weight is not None:
            W = weight.to(dtype).view(self.groups, -1, 1) * W
        if bias is None:
            return W, -(W @ mean)
        return W, torch.baddbmm(bias.to(dtype).view(self.groups, -1, 1), W, mean, alpha=-1)

    def observed_features(self, x: Tensor) -> Observation:
        """(G, d, M) of (N, C, *spatial), in the working dtype; ε is what the ridge of this batch amounts to."""
        self._check_input(x)
        channels = x.detach().to(working_dtype(x.dtype)).transpose(0, 1).flatten(1)
        _, unit, _, cov, _ = self._moments(x.detach())
        eps = mean_ridge(cov, self.eps, relative=self.relative, unit=unit)
        return Observation(channels.unflatten(0, (self.groups, -1)), eps)

    def _register_statistics(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        d = self.num_features // self.groups
        kind = {"device": device, "dtype": working_dtype(dtype or torch.get_default_dtype())}
        shapes: dict[str, tuple[int, ...]] = {"running_mean": (self.num_features,)}
        # The last one is derived, hence not saved, but a buffer: compiled and exported graphs read it as one.
        matrices = ("running_cov", "evaluation_whitening") if self.running == "covariance" else ("running_whitening",)
        shapes |= {name: (self.groups, d, d) for name in matrices}
        if self.track_running_stats:
            for name, shape in shapes.items():
                self.register_buffer(name, torch.empty(shape, **kind), persistent=name != "evaluation_whitening")
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self._say(device)
        for name in STATISTICS:
            if name not in self._buffers:
                # After the others: torch.export counts those that are None, and would take its input for a buffer.
                self.register_buffer(name, None, persistent=name != "evaluation_whitening")
        self._derived = Derived()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance (or whitening) to I and the count to 0."""
        for vector in (self.running_mean, self.num_batches_tracked):
            if vector is not None:
                vector.zero_()
        for matrix in (self.running_cov, self.running_whitening):
            if matrix is not None:
                matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix))
        self._renew_derived()

    @torch.no_grad()
    def _track(
        self, mean: Tensor, cov: Tensor, whitening: Tensor, count: int | Tensor, unit: Tensor | None = None
    ) -> None:
        """Move the running statistics towards those of a batch of ``count`` samples, measured in this unit."""
        if unit is not None:
            mean, cov, whitening = mean / unit, cov / unit / unit, whitening * unit
            require_squares(mean, cov, self.describe)
        buffers = self._buffers  # a look-up by attribute takes as long as a small operation
        running_mean, tracked = buffers["running_mean"], buffers["num_batches_tracked"]
        running_cov, running_whitening = buffers["running_cov"], buffers["running_whitening"]
        assert running_mean is not None and tracked is not None
        tracked.add_(1)  # += would assign a buffer, which torch.export treats apart
        factor = self.momentum
        if factor is None:
            factor = tracked.to(running_mean.dtype).reciprocal()  # 1/int64 would be float32
        running_mean.lerp_(_in(mean.view(-1), running_mean.dtype), factor)
        if running_cov is not None:
            # The unbiased estimate, as torch.nn.BatchNorm2d tracks it.
            running_cov.lerp_(_in(cov * (count / (count - 1)), running_cov.dtype), factor)
        if running_whitening is not None:
            running_whitening.lerp_(_in(whitening, running_whitening.dtype), factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Rounded to half precision a covariance is indefinite from a condition number of 256 or 2048 on.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            if (old := before[name]) is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        return self

    def meaning(self) -> dict[str, Any]:
        """Methods differ by a rotation of the output, which the layers behind have learned; solvers by their error.

        Only of a damped iteration (:class:`IterNorm2d`) the length is another normalisation, and meant to be.
        """
        solver = self.solver
        if isinstance(solver, NewtonSchulz) and solver.tolerance is None:
            return {"method": self.method, "steps": solver.steps}
        return {"method": self.method}

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, local_metadata: Any, *lists: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        error = upgrade(self, state_dict, prefix)
        if error:
            lists[-1].append(f"{self.describe()}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        whitening, cov = self.evaluation_whitening, self.running_cov
        if cov is not None and whitening is not None and whitening.is_meta and not cov.is_meta:
            self.evaluation_whitening = torch.zeros_like(
                cov
            )  # loaded with assign=True, which gives what is saved alone
        if not self.training:
            self._renew_derived()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not mode:
            self._renew_derived()
        return self

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
        whitening = self._running_whitening()
        W, b = self._affine(whitening, mean.view(self.groups, -1, 1), dtype or mean.dtype, self.weight, self.bias)
        return W.flatten(0, 1).view(self.num_features, -1, *(1,) * (self._dims[-1] - 2)), b.flatten()

    def _running_whitening(self) -> Tensor:
        """(G, d, d) of evaluation. In a graph (compiled, exported, traced, captured) it is the buffer as it is then."""
        if self.running_whitening is not None:
            return self.running_whitening
        mean, cov = self.running_mean, self.running_cov
        assert mean is not None and cov is not None and self.evaluation_whitening is not None
        if is_compiling() or torch.jit.is_tracing() or not has_values(cov):
            return self.evaluation_whitening
        if under_functorch():
            return self._whitening_of_average(mean, cov)
        # The solver is compared by what it holds: its settings may be changed under it.
        settings = {
            k: v for k, v in getattr(self.solver, "__dict__", {}).items() if k not in ("has_warned", "times_checked")
        }
        options = self.eps, self.relative, self.method, self.solver, str(settings)
        whitening = self._derived.of((mean, cov), options, self._whitening_of_average)
        self._write_buffer(whitening)
        return whitening

    def _write_buffer(self, whitening: Tensor) -> None:
        """Give it to graphs, in the place where they read it."""
        buffer = self.evaluation_whitening
        assert buffer is not None
        if self._derived.is_written(whitening, buffer):
            return
        if buffer.shape == whitening.shape and buffer.dtype == whitening.dtype and not buffer.is_inference():
            if not torch.equal(buffer, whitening):
                with torch.no_grad():
                    buffer.copy_(whitening)
        else:
            self.evaluation_whitening = buffer = whitening.clone()
        self._derived.remember_written(whitening, buffer)

    def _renew_derived(self) -> None:
        """Bring the whitening matrix of evaluation up to date."""
        cov = self.running_cov
        if cov is None or self.running_mean is None or not has_values(cov):
            return
        self._derived.forget_written()  # a write into the buffer's ``.data`` has no version
        try:
            self._running_whitening()
        except NonFiniteMatrixError:  # a forward pass says so; a model that diverged may be loaded to look at it
            self._write_buffer(torch.full_like(cov, torch.nan))

    def _whitening_of_average(self, mean: Tensor, cov: Tensor) -> Tensor:
        with self._accepting_rounding(cov):
            return self._whitening(without_constants(cov, mean.view(self.groups, -1, 1)))

    def _accepting_rounding(self, cov: Tensor) -> AbstractContextManager[None]:
        """A context in which negative eigenvalues of a running covariance count as 0.

        An average of covariances has them by rounding alone, but maybe by that of a shorter dtype than it is in now (a
        model trained in single precision and evaluated in double): ε outweighs what the checks would refuse.
        """
        if self.method == "cholesky":  # sees P + εI alone, and only the check notices where it fails
            return nullcontext()
        if readable(cov):
            with recording(self.solver_events, self.describe):
                require_finite(cov, "running_cov")
        return value_checks(False)

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
        # Asked of an exported graph, the question would be a bound on its batches.
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


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _require_groups(layer: str, num_features: int, groups: int) -> None:
    """Refuse what is no number of groups, such as the ε that a batch norm takes in this place."""
    if isinstance(groups, bool) or not isinstance(groups, Integral):
        hint = f"; for ε, the second argument of a batch norm, write eps={groups}" if isinstance(groups, float) else ""
        raise TypeError(f"the second argument of {layer} is groups, an integer, got {groups!r}{hint}")
    if num_features < 1 or groups < 1 or num_features % groups:
        raise ValueError(
            f"num_features must be divisible by groups, got num_features={num_features} and groups={groups}"
        )
