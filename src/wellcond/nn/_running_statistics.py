"""The running statistics of decorrelated batch norm: buffers, updates, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.precision import HALF, working_dtype
from wellcond._shared.torch_internals import called_by

from ._base import SpectralModule
from ._migration import upgrade
from ._range import require_squares

Running = Literal["covariance", "whitening"]
DERIVED = "evaluation_whitening", "evaluation_mark"
"""The whitening matrix of evaluation, and by which covariance to recognise: the square roots of its entries, with their
signs. Roots, since after an average of all buffers the averages of two equal ones would be equal. Computed from the
others, so not saved; buffers nonetheless, since compiled and exported graphs read them."""
STATISTICS = "running_mean", "running_cov", "running_whitening", *DERIVED, "num_batches_tracked"
FUSING = (
    *("fuse_conv_bn_eval", "fuse_linear_bn_eval", "fuse_conv_and_bn", "_fuse_conv_bn"),
    *("_fuse_conv_bn_weights", "_fuse_bn_tensor", "fuse"),
)
"""Functions of torch, YOLO, MMEngine, kornia, RepVGG and LeViT that put a batch norm into the layer before it,
by its variance."""


class RunningStatistics(SelfDescribing, BatchNorm, SpectralModule):
    """Mean and covariance (or whitening matrix) averaged over training batches.

    ``BatchNorm`` is a base class for its name, by which tools recognise running statistics, and for how it loads
    ``num_batches_tracked``.
    """

    _version = 2
    groups: int
    running: Running
    running_mean: Tensor | None
    running_cov: Tensor | None
    running_whitening: Tensor | None
    evaluation_whitening: Tensor | None
    evaluation_mark: Tensor | None
    num_batches_tracked: Tensor | None

    def _statistics_changed(self) -> None:
        """Called after the running statistics were reset or loaded."""
        raise NotImplementedError

    def _register_statistics(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        d = self.num_features // self.groups
        kind = {"device": device, "dtype": working_dtype(dtype or torch.get_default_dtype())}
        shapes: dict[str, tuple[int, ...]] = {"running_mean": (self.num_features,)}
        matrices = ("running_cov", *DERIVED) if self.running == "covariance" else ("running_whitening",)
        shapes |= {name: (self.groups, d, d) for name in matrices}
        if self.track_running_stats:
            for name, shape in shapes.items():
                self.register_buffer(name, torch.empty(shape, **kind), persistent=name not in DERIVED)
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self._say(device)
        for name in STATISTICS:
            if name not in self._buffers:
                # Last: torch.export counts buffers that are None, and would take its input for one of them. Persistent
                # though nothing is saved: Accelerate takes the others for tensors.
                self.register_buffer(name, None)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for name in DERIVED:  # which an earlier version may not have had
            if name not in self._buffers:
                cov = self.running_cov
                value = None if cov is None else torch.full_like(cov, torch.nan)
                self.register_buffer(name, value, persistent=value is None)

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance (or whitening) to I and the count to 0."""
        for vector in (self.running_mean, self.num_batches_tracked):
            if vector is not None:
                vector.zero_()
        for matrix in (self.running_cov, self.running_whitening):
            if matrix is not None:
                matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix))
        self._statistics_changed()

    @property
    def running_var(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy (C,) of the diagonal of the running covariance, for tools that read or reset it; None without one.
        Assigning a variance replaces the whole covariance by a diagonal one. Writing into the copy changes nothing.

        Raises:
            RuntimeError: read by a function that would take the layer for a plain batch norm.
        """
        if called_by("convert_splitbn_model", "convert_syncbn_model"):  # of timm and apex
            raise RuntimeError(
                f"{type(self).__name__} would be replaced by a plain batch norm: convert the model first, and replace "
                "norms by decorrelated ones then"
            )
        if called_by("convert_sync_batchnorm"):  # which would put a plain SyncBatchNorm here
            raise RuntimeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm does not know {type(self).__name__}: take "
                "wellcond.nn.convert_sync(model, batchnorm=True), which converts both kinds, and with it drop "
                "Trainer(sync_batchnorm=True)"
            )
        if called_by(*FUSING):
            raise RuntimeError(
                f"{type(self).__name__} cannot be fused into the layer before it by its running variance alone: take "
                "wellcond.nn.fold(model), which folds the whitening"
            )
        return None if self.running_cov is None else self.running_cov.diagonal(dim1=-2, dim2=-1).clone().flatten()

    @running_var.setter
    def running_var(self, variance: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        cov = self.running_cov
        if cov is not None:
            self.running_cov = None if variance is None else torch.diag_embed(variance.view(cov.shape[:-1])).to(cov)
            if not self.training:
                self._statistics_changed()

    def _track(
        self, mean: Tensor, cov: Tensor, whitening: Tensor, count: int | Tensor, unit: Tensor | None = None
    ) -> None:
        """Move the running statistics towards those of a batch of ``count`` samples that was multiplied by ``unit``.

        To be called with detached tensors and without gradients.
        """
        if unit is not None:
            mean, cov, whitening = mean / unit, cov / unit / unit, whitening * unit
            require_squares(mean, cov, self.describe)
        buffers = self._buffers  # attribute look-up takes as long as a small operation
        running_mean, tracked = buffers["running_mean"], buffers["num_batches_tracked"]
        running_cov, running_whitening = buffers["running_cov"], buffers["running_whitening"]
        assert running_mean is not None and tracked is not None
        tracked.add_(1)  # += would assign a buffer, which torch.export treats differently
        factor = self.momentum
        if factor is None:
            factor = tracked.to(running_mean.dtype).reciprocal()  # 1/int64 would be float32
        running_mean.lerp_(_cast(mean.view(-1), running_mean.dtype), factor)
        if running_cov is not None:
            # The unbiased estimate, as torch.nn.BatchNorm2d tracks it.
            running_cov.lerp_(_cast(cov * (count / (count - 1)), running_cov.dtype), factor)
        if running_whitening is not None:
            running_whitening.lerp_(_cast(whitening, running_whitening.dtype), factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Rounded to bfloat16 or float16, a covariance of condition number above 256 or 2048 becomes indefinite.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            if (old := before[name]) is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, local_metadata: Any, *lists: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        error = upgrade(self, state_dict, prefix)
        if error:
            lists[-1].append(f"{self.describe()}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        cov = self.running_cov
        for name in DERIVED:
            derived = self._buffers[name]
            if cov is not None and derived is not None and derived.is_meta and not cov.is_meta:
                # Loaded with assign=True, which replaces only what was saved.
                self._buffers[name] = torch.zeros_like(cov)
        if not self.training:
            self._statistics_changed()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
