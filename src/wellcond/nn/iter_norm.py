"""IterNorm: decorrelated batch norm by a few steps of the Newton–Schulz iteration (Huang et al., CVPR 2019)."""

from __future__ import annotations

from typing import Any

from wellcond.linalg import NewtonSchulz

from ._base import naming_options_of
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from .decorrelated_batchnorm import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d


class _Iterated(_DecorrelatedBatchNorm):
    """Fixes the solver to the Newton–Schulz iteration."""

    @naming_options_of(_DecorrelatedBatchNorm)
    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        steps: int = 5,
        solver: None = None,
        **options: Any,
    ) -> None:
        if solver is not None:
            name = type(self).__name__
            raise ValueError(
                f"{name} has a solver of its own, the Newton–Schulz iteration: write steps= for its length, or "
                f"{name.replace('IterNorm', 'DecorrelatedBatchNorm')}(..., solver={solver!r}) for another one"
            )
        # The damped root is intended, so it causes no warning.
        options["solver"] = NewtonSchulz(steps, tolerance=None)
        super().__init__(num_features, groups, eps, momentum, affine, track_running_stats, **options)


class IterNorm1d(_Iterated, DecorrelatedBatchNorm1d):
    """Whiten the channels of vectors or sequences by Newton–Schulz steps: :class:`IterNorm2d` for (N, C) or (N, C, L).

    The arguments are those of that class.

    Shape: (N, C) or (N, C, L) to the same, in the same dtype; half precision and autocast are computed in float32.

    Raises:
        TypeError: ``groups`` is no integer; input of no real floating dtype.
        ValueError: a ``solver``; groups not dividing num_features; wrong number of dimensions or channels; fewer than
            two values per channel in training; NaN or infinity in the input (checked on the CPU by default).

    Complexity: two products of C × C/groups by C × N·L forward and three backward, with L positions per sample, and 3
    ``steps`` products of (C/groups)³. Source: Huang et al., Iterative Normalization, CVPR 2019.

    Example:
        >>> import torch
        >>> IterNorm1d(4)(torch.randn(32, 4)).shape
        torch.Size([32, 4])
    """


class IterNorm2d(_Iterated, DecorrelatedBatchNorm2d):
    """Decorrelated batch norm whose inverse root is that of ``steps`` Newton–Schulz iterations.

    After a few steps, directions of small variance are not yet white; the published layer takes 5 on purpose, as a
    compromise between batch norm and full whitening. Evaluation applies the same steps to the running covariance.

    Args:
        num_features: C, channels of the input.
        groups, eps, momentum, affine, track_running_stats, running, sync, method, relative, process_group, device,
            dtype: have the meaning that they have in :class:`DecorrelatedBatchNorm2d`; ``method`` is ``"zca"`` or
            ``"pca"``.
        steps: number of iterations.
        solver: must not be given; the error says what to write instead.

    Shape: (N, C, H, W) to the same, in the same dtype and memory format; half precision is computed in float32.

    Raises:
        TypeError: ``groups`` is no integer; input of no real floating dtype.
        ValueError: a ``solver``; groups not dividing num_features; wrong number of dimensions or channels; fewer than
            two values per channel in training; NaN or infinity in the input (checked on the CPU by default).

    Complexity: two products of C × C/groups by C × N·L forward and three backward, and 3 ``steps`` of (C/groups)³.
    Source: Huang et al., Iterative Normalization, CVPR 2019.

    Example:
        >>> import torch
        >>> IterNorm2d(4)(torch.randn(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])
    """


class IterNorm3d(_Iterated, DecorrelatedBatchNorm3d):
    """Whiten the channels of volumes by Newton–Schulz steps: :class:`IterNorm2d` for (N, C, D, H, W).

    The arguments are those of that class.

    Shape: (N, C, D, H, W) to the same, in the same dtype and memory format; half precision and autocast are computed in
    float32.

    Raises:
        TypeError: ``groups`` is no integer; input of no real floating dtype.
        ValueError: a ``solver``; groups not dividing num_features; wrong number of dimensions or channels; fewer than
            two values per channel in training; NaN or infinity in the input (checked on the CPU by default).

    Complexity: two products of C × C/groups by C × N·L forward and three backward, with L positions per sample, and 3
    ``steps`` products of (C/groups)³. Source: Huang et al., Iterative Normalization, CVPR 2019.

    Example:
        >>> import torch
        >>> IterNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """
