"""Decorrelated batch norm for any number of spatial dimensions: forward pass, running statistics and evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from wellcond._shared.checks import checks_values, require_finite
from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.names import require_known
from wellcond._shared.precision import HALF, full_precision, working_dtype
from wellcond._shared.torch_internals import is_compiling, under_functorch
from wellcond.linalg import NewtonSchulz, Solver, WhiteningMethod, recording, value_checks, whitening_matrix

from ._base import Observation, SpectralModule, require_input
from ._fused_passes import affine_map, moments
from ._migration import upgrade
from ._minimum_ridge import mean_ridge, with_ridge
from ._sync import joined_moments, processes

if TYPE_CHECKING:
    from typing_extensions import Self

Running = Literal["covariance", "whitening"]
SHOWN = "groups", "eps", "momentum", "affine", "track_running_stats", "solver", "running", "sync", "method", "relative"


class _DecorrelatedBatchNorm(SpectralModule, SelfDescribing):
    """The layer; a subclass says for which dimensions. See :class:`DecorrelatedBatchNorm2d`."""

    _version = 2
    _dims: tuple[int, ...] = ()
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
        super().__init__()
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
        self._say(device)
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
        mean, cov, context = moments(x, self.groups)
        if together:
            mean, cov, count = joined_moments(mean, cov, count, self.process_group)
            if checks_values(count):
                self._check_count(int(count), x)
        whitening = self._whitening(cov)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), cov.detach(), whitening.detach(), count)
        return affine_map(x, *self._affine(whitening, context.from_origin(mean), cov.dtype), context)

    def _whitening(self, cov: Tensor) -> Tensor:
        """The whitening matrices of covariances (G, d, d); errors name the layer."""
        cov, eps = with_ridge(cov, self.eps, relative=self.relative)
        with self._recording(self.solver):
            return whitening_matrix(cov, eps=eps, method=self.method, relative=self.relative, solver=self.solver)

    def _affine(self, whitening: Tensor, mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W (G, d, d) and b (G, d, 1) with y = W x + b."""
        W, mean = whitening.to(dtype), mean.to(dtype)
        if self.weight is None or self.bias is None:
            return W, -(W @ mean)
        W = self.weight.to(dtype).view(self.groups, -1, 1) * W
        return W, self.bias.to(dtype).view(self.groups, -1, 1) - W @ mean

    def observed_features(self, x: Tensor) -> Observation:
        """(G, d, M) of (N, C, *spatial), in the working dtype; ε is what the ridge of this batch amounts to."""
        self._check_input(x)
        channels = x.detach().to(working_dtype(x.dtype)).transpose(0, 1).flatten(1)
        _, cov, _ = moments(x.detach(), self.groups)
        return Observation(channels.unflatten(0, (self.groups, -1)), mean_ridge(cov, self.eps, relative=self.relative))

    def _register_statistics(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        d = self.num_features // self.groups
        kind = {"device": device, "dtype": working_dtype(dtype or torch.get_default_dtype())}
        for name, shape, wanted in (
            ("running_mean", (self.num_features,), True),
            ("running_cov", (self.groups, d, d), self.running == "covariance"),
            ("running_whitening", (self.groups, d, d), self.running == "whitening"),
            ("evaluation_whitening", (self.groups, d, d), self.running == "covariance"),
        ):
            tensor = torch.empty(shape, **kind) if self.track_running_stats and wanted else None
            # The last one is derived, hence not saved, but a buffer: compiled and exported graphs read it as one.
            self.register_buffer(name, tensor, persistent=name != "evaluation_whitening")
        count = torch.tensor(0, dtype=torch.long, device=device) if self.track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self._derived_from: tuple[Tensor, int] | None = None

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance (or whitening) to I and the count to 0."""
        for vector in (self.running_mean, self.num_batches_tracked):
            if vector is not None:
                vector.zero_()
        for matrix in (self.running_cov, self.running_whitening):
            if matrix is not None:
                matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix))
        self._derive()

    @torch.no_grad()
    def _track(self, mean: Tensor, cov: Tensor, whitening: Tensor, count: int | Tensor) -> None:
        """Move the running statistics towards those of a batch of ``count`` samples."""
        assert self.running_mean is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        count_so_far = self.num_batches_tracked.to(self.running_mean.dtype)  # 1/int64 would be float32
        factor = count_so_far.reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), factor)
        if self.running_cov is not None:
            # The unbiased estimate, as torch.nn.BatchNorm2d tracks it.
            self.running_cov.lerp_((cov * (count / (count - 1))).to(self.running_cov.dtype), factor)
        if self.running_whitening is not None:
            self.running_whitening.lerp_(whitening.to(self.running_whitening.dtype), factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Rounded to half precision a covariance is indefinite from a condition number of 256 or 2048 on.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            if (old := before[name]) is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a copy the versions of tensors count from zero again.
        super().__setstate__({**state, "_derived_from": None})

    def meaning(self) -> dict[str, Any]:
        """Methods differ by a rotation of the output, which the layers behind have learned; solvers by their error.

        Only of a damped iteration (:class:`IterNorm2d`) the length is another normalisation, and meant to be.
        """
        solver = self.solver
        if isinstance(solver, NewtonSchulz) and solver.tolerance is None:
            return {"method": self.method, "steps": solver.steps}
        return {"method": self.method}

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, local_metadata: Any, *lists: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        error = upgrade(self, state_dict, prefix, local_metadata.get("version"))
        if error:
            lists[-1].append(f"{self.describe()}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        if not self.training:
            self._derive()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not mode:
            self._derive()
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
        W, b = self._affine(self._running_whitening(), mean.view(self.groups, -1, 1), dtype or mean.dtype)
        return W.flatten(0, 1).view(self.num_features, -1, *(1,) * (self._dims[-1] - 2)), b.flatten()

    def _running_whitening(self) -> Tensor:
        """(G, d, d) of evaluation. In a graph (compiled, exported, traced) it is the buffer as it is then."""
        if self.running_whitening is not None:
            return self.running_whitening
        assert self.running_cov is not None and self.evaluation_whitening is not None
        if is_compiling() or torch.jit.is_tracing():
            return self.evaluation_whitening
        if under_functorch():
            return self._whitening(self.running_cov)
        self._derive()
        return self.evaluation_whitening

    def _derive(self) -> None:
        """Recompute the whitening matrix of evaluation if the running covariance has changed since."""
        cov = self.running_cov
        if cov is None or cov.is_meta:
            return
        version = -1 if cov.is_inference() else cov._version
        if self._derived_from is not None and self._derived_from[0] is cov and self._derived_from[1] == version != -1:
            return
        # A new tensor each time: graphs that are still to be differentiated keep the old one.
        with torch.inference_mode(False), torch.no_grad(), self._accepting_rounding(cov):
            self.evaluation_whitening = self._whitening(cov)
        self._derived_from = (cov, version)

    def _accepting_rounding(self, cov: Tensor) -> AbstractContextManager[None]:
        """A context in which negative eigenvalues of a running covariance count as 0.

        An average of covariances has them by rounding alone, but maybe by that of a shorter dtype than it is in now (a
        model trained in single precision and evaluated in double): ε outweighs what the checks would refuse.
        """
        if self.method == "cholesky":  # which sees P + εI only, and has nothing but the check against a failure
            return nullcontext()
        if checks_values(cov):
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
        if count <= d and not self._warned:
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
    """Refuse what is no number of groups, such as the ε that a batch norm takes in this place."""
    if isinstance(groups, bool) or not isinstance(groups, Integral):
        hint = f"; for ε, the second argument of a batch norm, write eps={groups}" if isinstance(groups, float) else ""
        raise TypeError(f"the second argument of {layer} is groups, an integer, got {groups!r}{hint}")
    if num_features < 1 or groups < 1 or num_features % groups:
        raise ValueError(
            f"num_features must be divisible by groups, got num_features={num_features} and groups={groups}"
        )
