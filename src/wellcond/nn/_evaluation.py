"""The affine map of decorrelated batch norm: its whitening matrix, and the one derived from the running statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.checks import readable, require_finite
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.torch_internals import (
    has_values,
    is_compiling,
    is_exporting,
    is_shape_only,
    under_forward_mode,
    under_functorch,
)
from wellcond.linalg import Solver, WhiteningMethod, recording, value_checks, whitening_matrix

from ._derived import Derived
from ._minimum_ridge import with_ridge, without_constants
from ._range import leaves_range, unit_of_covariances
from ._running_statistics import DERIVED, RunningStatistics


class EvaluationMap(RunningStatistics):
    """y = W x + b with W = γ S and b = β − W μ, of given or running statistics.

    In evaluation S is computed from the running covariance once, and again when the statistics or options change.
    Graphs (compiled, exported, traced, captured) read it from the buffer ``evaluation_whitening``; those that see the
    running covariance as it is when they run, compiled and captured ones, compare it with ``evaluation_mark``.
    """

    solver: str | Solver
    method: WhiteningMethod
    relative: bool
    _dims: tuple[int, ...] = ()
    evaluation_whitening: Tensor | None
    evaluation_mark: Tensor | None
    _derived: Derived

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

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not mode:
            self._statistics_changed()
        return self

    def evaluation_map(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The layer in evaluation as a convolution of kernel 1: its weight (C, C/groups, 1, …) and bias (C).

        Args:
            dtype: of both; None for that of the running statistics, in which the whitening matrix is computed.

        Raises:
            RuntimeError: the layer keeps no running statistics.
        """
        if self.running_mean is None:
            raise RuntimeError(f"{self.describe()} keeps no running statistics: its output depends on the batch")
        W, b = self._running_affine(dtype or self.running_mean.dtype)
        return W.flatten(0, 1).view(self.num_features, -1, *(1,) * (self._dims[-1] - 2)), b.flatten()

    def _running_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W and b of evaluation, see :meth:`_affine`."""
        mean = self.running_mean
        assert mean is not None
        return self._affine(self._running_whitening(), mean.view(self.groups, -1, 1), dtype, self.weight, self.bias)

    def _running_whitening(self) -> Tensor:
        """S (G, d, d) of evaluation; in a graph the buffer, as it is when the graph runs."""
        if self.running_whitening is not None:
            return self.running_whitening
        mean, cov = self.running_mean, self.running_cov
        assert mean is not None and cov is not None
        if is_compiling() or torch.jit.is_tracing() or not has_values(cov):
            return self._whitening_in_graph(cov)
        if under_functorch() or under_forward_mode():
            return self._whitening_of_average(mean, cov)
        # Solvers are compared by their attributes, which may be changed in place.
        settings = {
            k: v for k, v in getattr(self.solver, "__dict__", {}).items() if k not in ("has_warned", "times_checked")
        }
        options = self.eps, self.relative, self.method, self.solver, str(settings)
        whitening = self._derived.of((mean, cov), options, self._whitening_of_average)
        self._write_buffers(whitening, cov)
        return whitening

    def _whitening_in_graph(self, cov: Tensor) -> Tensor:
        """S from the buffer; NaN where the running covariance is no longer the one that it is of, as nothing can be
        raised or decomposed there. Options and the mean, on which S depends where a channel is constant, are not
        compared; nor is what both were rounded to by a change of dtype."""
        whitening, mark = self.evaluation_whitening, self.evaluation_mark
        assert whitening is not None and mark is not None
        if is_exporting() or torch.jit.is_tracing() or (not is_compiling() and is_shape_only(cov)):
            return whitening  # the statistics are constants of the graph
        single = torch.finfo(torch.float32)
        same = (mark * mark.abs() - cov).abs() <= 8 * single.eps * cov.abs() + single.tiny
        return torch.where(same.all(), whitening, torch.nan)

    def _write_buffers(self, whitening: Tensor, cov: Tensor) -> None:
        """Copy S, and the mark of its covariance, to the buffers that graphs read, unless they are there."""
        assert self.evaluation_whitening is not None
        if self._derived.is_written(whitening, self.evaluation_whitening):
            return
        cov = cov.detach()
        for name, value in zip(DERIVED, (whitening, cov.abs().sqrt().copysign(cov)), strict=True):
            buffer = self.get_buffer(name)
            if buffer.shape == value.shape and buffer.dtype == value.dtype and not buffer.is_inference():
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            else:
                self._buffers[name] = value.clone()
        self._derived.remember_written(whitening, self.evaluation_whitening)

    def _statistics_changed(self) -> None:
        """Recompute S of evaluation and its buffer."""
        cov = self.running_cov
        if cov is None or self.running_mean is None or not has_values(cov):
            return
        self._derived.forget_written()  # a write into the buffer's ``.data`` does not change its version
        try:
            self._running_whitening()
        except NonFiniteMatrixError:  # raised again by a forward pass; a model that diverged can still be loaded
            self._write_buffers(torch.full_like(cov, torch.nan), cov)

    def _whitening_of_average(self, mean: Tensor, cov: Tensor) -> Tensor:
        with self._accepting_rounding(cov):
            return self._whitening(without_constants(cov, mean.view(self.groups, -1, 1)))

    def _accepting_rounding(self, cov: Tensor) -> AbstractContextManager[None]:
        """A context in which negative eigenvalues of a running covariance count as 0.

        An average of covariances has negative eigenvalues by rounding alone, but possibly by rounding in a lower
        precision than its present one (a model trained in single precision and evaluated in double). ε outweighs them.
        """
        if self.method == "cholesky":  # decomposes P + εI, so that only this check would notice a failure
            return nullcontext()
        if readable(cov):
            with recording(self.solver_events, self.describe):
                require_finite(cov, "running_cov")
        return value_checks(False)
