"""Batch moments of several processes as those of their joined batch, differentiably.

Each process has a share of the samples, of any size, zero among them. With counts n_i, means μ_i and covariances P_i,

    n = Σ n_i,    μ = Σ n_i μ_i / n,    P = Σ n_i (P_i + (μ_i − μ)(μ_i − μ)ᵀ) / n

(Chan, Golub and LeVeque, The American Statistician, 1983): two sums over the processes forward and two backward, and no
difference of large numbers. As in :class:`torch.nn.SyncBatchNorm` the gradient of the statistics is that of the sum of
all losses, while γ and β have the gradient of their own process, for DistributedDataParallel to average.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes(group: Any) -> int:
    """How many processes share the statistics; 1 where no process group is initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def joined_moments(mean: Tensor, cov: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (G, d, 1), covariance (G, d, d) and count (0-dim, float64) of the joined batch, from those of the shares."""
    G, d = mean.shape[:2]
    # A count beyond 2^24 does not fit float32.
    counts = mean.new_full((1,), count, dtype=torch.float64)
    sums = _AllReduce.apply(torch.cat([counts, (count * mean).flatten().double()]), group)
    total = sums[0].detach()  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    joined = (sums[1:] / total.clamp_min(1)).view(G, d, 1)  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    away = mean.double() - joined
    squares = _AllReduce.apply(count * (cov.double() + away @ away.mT), group) / total.clamp_min(1)  # pyright: ignore[reportOptionalOperand]
    return joined.to(mean.dtype), squares.to(cov.dtype), total


class _AllReduce(torch.autograd.Function):
    """The sum over the processes of a group; its adjoint is the sum of the gradients over the same processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _AllReduce.apply(grad, ctx.group), None  # pyright: ignore[reportReturnType]
