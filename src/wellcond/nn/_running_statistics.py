"""The running mean and covariance of a whitening layer, and the whitening matrix that evaluation takes from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wellcond._shared.checks import checks_values, require_finite
from wellcond._shared.torch_internals import under_functorch
from wellcond.linalg import Solver, WhiteningMethod, recording, value_checks, whitening_matrix
from wellcond.linalg.solvers import choose_solver

from ._base import SpectralModule
from ._least_ridge import with_ridge
from ._migration import upgrade

Running = Literal["covariance", "whitening"]
STATISTICS = ("running_mean", "running_cov", "running_whitening", "evaluation_whitening")
HALF = (torch.float16, torch.bfloat16)


class RunningWhitening(SpectralModule):
    """State and evaluation of a layer that whitens channels by groups; the training pass is the subclass's.

    Statistics stay in float32 where a module is converted to half precision: rounded to 8 or 11 bits a covariance is
    indefinite as soon as its condition number exceeds 256 or 2048, and its whitening matrix noise.
    """

    _version = 2
    running_mean: Tensor | None
    running_cov: Tensor | None
    running_whitening: Tensor | None
    evaluation_whitening: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        groups: int,
        eps: float,
        momentum: float | None,
        track_running_stats: bool,
        solver: str | Solver,
        running: Running,
        method: WhiteningMethod,
        relative: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features < 1 or groups < 1 or num_features % groups:
            raise ValueError(
                f"num_features must be divisible by groups, got num_features={num_features} and groups={groups}"
            )
        if running not in ("covariance", "whitening"):
            raise ValueError(f"running must be 'covariance' or 'whitening', got {running!r}")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be positive, got {eps}")
        whitening_matrix(torch.eye(1), method=method, solver=solver)  # refuses what does not go together
        if running == "whitening" and method == "pca":
            raise ValueError(
                "running='whitening' averages matrices whose rows method='pca' reorders from batch to batch: take "
                "running='covariance', or method 'zca' or 'cholesky'"
            )
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.track_running_stats = track_running_stats
        self.solver, self.running, self.relative = solver, running, relative
        self.method: WhiteningMethod = method
        d = num_features // groups
        kind = {"device": device, "dtype": torch.float32 if dtype in HALF else dtype}

        def buffer(name: str, *shape: int, wanted: bool = True, persistent: bool = True) -> None:
            tensor = torch.empty(*shape, **kind) if track_running_stats and wanted else None
            self.register_buffer(name, tensor, persistent=persistent)

        buffer("running_mean", num_features)
        buffer("running_cov", groups, d, d, wanted=running == "covariance")
        buffer("running_whitening", groups, d, d, wanted=running == "whitening")
        # Derived, hence not saved, but a buffer: compiled and exported graphs read it as one.
        buffer("evaluation_whitening", groups, d, d, wanted=running == "covariance", persistent=False)
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self._derived_from: tuple[Tensor, int] | None = None

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance (or whitening) to I and the count to 0."""
        with torch.no_grad():
            if self.running_mean is not None and self.num_batches_tracked is not None:
                self.running_mean.zero_()
                self.num_batches_tracked.zero_()
            for matrix in (self.running_cov, self.running_whitening):
                if matrix is not None:
                    matrix.copy_(torch.eye(matrix.shape[-1]).expand_as(matrix))
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

    def _whitening(self, cov: Tensor) -> Tensor:
        """The whitening matrices of covariances (G, d, d); errors name the layer."""
        # A graph of matrix products stays whole; nothing would be counted in it.
        whole = torch.compiler.is_compiling() and choose_solver(self.solver).traceable
        cov, eps = with_ridge(cov, self.eps, relative=self.relative)
        with nullcontext() if whole else recording(self.solver_events, self.describe):
            return whitening_matrix(cov, eps=eps, method=self.method, relative=self.relative, solver=self.solver)

    def _running_whitening(self) -> Tensor:
        """(G, d, d) of evaluation. In a graph (compiled, exported, traced) it is the buffer as it is then."""
        if self.running_whitening is not None:
            return self.running_whitening
        assert self.running_cov is not None and self.evaluation_whitening is not None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.evaluation_whitening
        if under_functorch():
            return self._whitening(self.running_cov)
        self._derive()
        return self.evaluation_whitening

    def _derive(self) -> None:
        """Compute the whitening matrix of evaluation anew if the running covariance has changed since."""
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

    def _accepting_rounding(self, cov: Tensor) -> Any:
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

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not mode:
            self._derive()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Versions of tensors start anew in a copy.
        super().__setstate__({**state, "_derived_from": None})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error = upgrade(self, state_dict, prefix, local_metadata.get("version"))
        if error:
            error_msgs.append(f"{self.describe()}: {error}")
            return
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.training:
            self._derive()
