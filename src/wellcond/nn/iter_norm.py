"""IterNorm: decorrelated batch norm by a few steps of the Newton–Schulz iteration (Huang et al., CVPR 2019)."""

from __future__ import annotations

from typing import Any

from wellcond.linalg import NewtonSchulz

from .decorrelated_batchnorm import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d


class _Iterated:
    """Puts the iteration in the place of the solver."""

    def __init__(self, num_features: int, *arguments: Any, steps: int = 5, **options: Any) -> None:
        # A damped root is what is asked for here, so it is no cause for a warning.
        options["solver"] = NewtonSchulz(steps, tolerance=None)
        super().__init__(num_features, *arguments, **options)  # pyright: ignore[reportCallIssue]


class IterNorm1d(_Iterated, DecorrelatedBatchNorm1d):
    """:class:`IterNorm2d` for (N, C) or (N, C, L)."""


class IterNorm2d(_Iterated, DecorrelatedBatchNorm2d):
    """Decorrelated batch norm whose inverse root is that of ``steps`` Newton–Schulz iterations.

    After few steps directions of small variance are not yet white: the published layer takes 5 on purpose, as a
    compromise between batch norm and full whitening. Its evaluation iterates on the running covariance.

    Args:
        num_features, groups, eps, momentum, affine, track_running_stats: as of :class:`DecorrelatedBatchNorm2d`, in
            this order; all other arguments of it but ``solver`` by name.
        steps: of the iteration.

    Shape, errors: as of :class:`DecorrelatedBatchNorm2d`. Complexity: its products, and 3 ``steps`` of (C/groups)³.
    Source: Huang et al., Iterative Normalization, CVPR 2019.

    Example:
        >>> import torch
        >>> IterNorm2d(4)(torch.randn(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])
    """


class IterNorm3d(_Iterated, DecorrelatedBatchNorm3d):
    """:class:`IterNorm2d` for (N, C, D, H, W)."""
