"""Decorrelated batch normalisation: y = γ ∘ (P + εI)^{-1/2} (x − μ) + β over the batch and space, by groups of
channels.

Huang et al., CVPR 2018. The running statistics are the mean and the covariance, from which evaluation derives its
whitening
matrix; a running average of whitening *matrices*, as published, is offered for comparison and is unsafe where
directions are nearly null.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from wellcond.linalg import Solver, invsqrtm, recording

from ._base import Observation, SpectralModule

Running = Literal["covariance", "whitening"]


class _DecorrelatedBatchNorm(SpectralModule):
    """The layer for any number of spatial dimensions; see :class:`DecorrelatedBatchNorm2d`."""

    _dims: tuple[int, ...] = ()
    running_mean: Tensor | None
    running_cov: Tensor | None
    running_whitening: Tensor | None
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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or groups < 1 or num_features % groups:
            raise ValueError(
                f"num_features must be divisible by groups, got num_features={num_features} and groups={groups}"
            )
        if running not in ("covariance", "whitening"):
            raise ValueError(f"running must be 'covariance' or 'whitening', got {running!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.solver, self.running = solver, running
        where = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **where)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, **where)) if affine else None
        d = num_features // groups
        matrix = torch.empty(groups, d, d, **where) if track_running_stats else None
        self.register_buffer("running_mean", torch.empty(num_features, **where) if track_running_stats else None)
        self.register_buffer("running_cov", matrix if running == "covariance" else None)
        self.register_buffer("running_whitening", matrix if running == "whitening" else None)
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self._evaluation: tuple[Tensor, int, Tensor] | None = None
        self._warned = False
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance (or whitening) to I and the count to 0."""
        with torch.no_grad():
            if self.running_mean is not None and self.num_batches_tracked is not None:
                self.running_mean.zero_()
                self.num_batches_tracked.zero_()
            for matrix in (self.running_cov, self.running_whitening):
                if matrix is not None:
                    matrix.copy_(torch.eye(matrix.shape[-1]).expand_as(matrix))

    def reset_parameters(self) -> None:
        """Reset the running statistics, and the affine parameters to 1 and 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        with torch.autocast(x.device.type, enabled=False):
            work = x.to(torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)
            grouped = work.reshape(x.shape[0], self.groups, self.num_features // self.groups, -1)
            if self.training or self.running_mean is None:
                mean, whitening = self._batch_statistics(grouped)
            else:
                mean, whitening = self.running_mean.view(self.groups, -1, 1), self._evaluation_whitening()
            y = self._affine_map(grouped, mean.to(work.dtype), whitening.to(work.dtype))
        return y.reshape(x.shape).to(x.dtype)

    def _affine_map(self, x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
        shift = -(whitening @ mean)
        if self.weight is not None and self.bias is not None:
            gamma = self.weight.to(x.dtype).view(self.groups, -1, 1)
            whitening, shift = (
                gamma * whitening,
                gamma * shift + self.bias.to(x.dtype).view(self.groups, -1, 1),
            )
        return whitening @ x + shift

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (G, d, 1) and whitening matrix (G, d, d) of this batch (N, G, d, L); updates the running ones."""
        count = x.shape[0] * x.shape[-1]
        if self._observers:
            self._observe(Observation(lambda: x.detach().permute(1, 2, 0, 3).flatten(2), self.eps))
        mean = x.mean((0, 3)).unsqueeze(-1)
        centred = x - mean
        cov = torch.einsum("ngcl,ngdl->gcd", centred, centred) / count
        with recording(self.solver_events, self.describe):
            whitening = invsqrtm(cov, eps=self.eps, solver=self.solver)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), cov.detach(), whitening.detach(), count)
        return mean, whitening

    @torch.no_grad()
    def _track(self, mean: Tensor, cov: Tensor, whitening: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), factor)
        if self.running_cov is not None:
            # The unbiased estimate, as torch.nn.BatchNorm2d tracks it.
            self.running_cov.lerp_((cov * (count / (count - 1))).to(self.running_cov.dtype), factor)
        if self.running_whitening is not None:
            self.running_whitening.lerp_(whitening.to(self.running_whitening.dtype), factor)

    def _evaluation_whitening(self) -> Tensor:
        """The whitening matrix of the running statistics, kept until they change."""
        if self.running_whitening is not None:
            return self.running_whitening
        cov = self.running_cov
        assert cov is not None
        version = -1 if cov.is_inference() else cov._version
        if self._evaluation is None or self._evaluation[0] is not cov or self._evaluation[1] != version:
            with recording(self.solver_events, self.describe), torch.no_grad():
                self._evaluation = (cov, version, invsqrtm(cov, eps=self.eps, solver=self.solver))
        return self._evaluation[2]

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self._dims:
            expected = " or ".join(f"{dim}D" for dim in self._dims)
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected input with {self.num_features} channels (got {x.shape[1]} channels, shape {tuple(x.shape)})"
            )
        if not (self.training or self.running_mean is None):
            return
        count, d = x.numel() // max(x.shape[1], 1), self.num_features // self.groups
        if count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} "
                f"in {self.describe()}"
            )
        if count <= d and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.describe()}: {count} values per channel give a covariance of rank at most {count - 1} for "
                f"{d} channels; eps={self.eps} keeps it finite, but take more samples or "
                f"groups={self.groups * -(-d // max(count - 1, 1))} or more",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, groups={self.groups}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, solver={self.solver!r}, "
            f"running={self.running!r}"
        )


class DecorrelatedBatchNorm1d(_DecorrelatedBatchNorm):
    """:class:`DecorrelatedBatchNorm2d` for (N, C) or (N, C, L)."""

    _dims = (2, 3)


class DecorrelatedBatchNorm2d(_DecorrelatedBatchNorm):
    """Whiten the channels of a batch: y = γ ∘ (P + εI)^{-1/2} (x − μ) + β, with P over batch and space.

    A :class:`torch.nn.BatchNorm2d` that also removes correlations: in training the output covariance is I (up to ε) in
    each group of channels.

    Args:
        num_features: C, channels of the input.
        groups: channels are whitened in this many groups of C / groups; more groups need fewer samples.
        eps: ε > 0, added to the eigenvalues of P.
        momentum: of the running statistics as in :class:`torch.nn.BatchNorm2d`; ``None`` for the cumulative average.
        affine: learn γ and β (C each).
        track_running_stats: keep running statistics for evaluation; without, evaluation uses the batch's.
        solver: of the inverse square root, as in :func:`wellcond.linalg.invsqrtm`; ``"newton_schulz"`` is IterNorm.
        running: ``"covariance"`` or ``"whitening"``, see the module's page; the buffer is ``running_cov`` or
            ``running_whitening``, (groups, C / groups, C / groups).

    Shape: (N, C, H, W) to the same, in the same dtype; half precision and autocast are computed in float32.

    Raises:
        ValueError: groups not dividing num_features; wrong number of dimensions or channels; fewer than two values per
            channel in training; NaN or infinity in the input (naming the layer; checked on the CPU by default).
        DecompositionError: the covariance could not be decomposed by any step of the fall-back chain.

    Complexity: O(N L C²/groups) for statistics and output, O(C³/groups²) for the decomposition.
    Source: Huang et al., Decorrelated Batch Normalization, CVPR 2018.

    Example:
        >>> import torch
        >>> from wellcond.linalg import covariance
        >>> layer = DecorrelatedBatchNorm2d(3)
        >>> y = layer(torch.randn(8, 3, 5, 5))
        >>> torch.allclose(covariance(y.transpose(0, 1).flatten(1)), torch.eye(3), atol=1e-3)
        True
    """

    _dims = (4,)


class DecorrelatedBatchNorm3d(_DecorrelatedBatchNorm):
    """:class:`DecorrelatedBatchNorm2d` for (N, C, D, H, W)."""

    _dims = (5,)
