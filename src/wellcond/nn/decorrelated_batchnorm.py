"""Decorrelated batch normalisation: y = γ ∘ (P + εI)^{-1/2} (x − μ) + β over the batch and space, by groups of
channels.

Huang et al., CVPR 2018. The running statistics are the mean and the covariance, from which evaluation derives its
whitening matrix; a running average of whitening *matrices*, as published, is offered for comparison and is unsafe where
directions are nearly null.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ._decorrelated_batchnorm import _DecorrelatedBatchNorm


class DecorrelatedBatchNorm1d(_DecorrelatedBatchNorm):
    """Whiten the channels of vectors or sequences: :class:`DecorrelatedBatchNorm2d` for inputs (N, C) or (N, C, L).

    The arguments are those of that class.

    Shape: (N, C) or (N, C, L) to the same, in the same dtype; half precision and autocast are computed in float32.

    Raises:
        TypeError: ``groups`` is no integer; input of no real floating dtype.
        ValueError: groups not dividing num_features; arguments that do not go together; wrong number of dimensions or
            channels; fewer than two values per channel in training; NaN or infinity in the input (checked on the CPU by
            default).
        DecompositionError: the covariance could not be decomposed by any step of the fall-back chain.

    Complexity: two products of C × C/groups by C × N·L forward and three backward, with L positions per sample, and
    O(C³/groups²) for the decomposition. Source: Huang et al., Decorrelated Batch Normalization, CVPR 2018.

    Example:
        >>> import torch
        >>> DecorrelatedBatchNorm1d(4)(torch.randn(32, 4)).shape
        torch.Size([32, 4])
    """

    _dims = (2, 3)


class DecorrelatedBatchNorm2d(_DecorrelatedBatchNorm):
    """Whiten the channels of a batch: y = γ ∘ (P + εI)^{-1/2} (x − μ) + β, with P over batch and space.

    A :class:`torch.nn.BatchNorm2d` that also removes correlations: in training the output covariance is I (up to ε) in
    each group of channels.

    Args:
        num_features: C, channels of the input.
        groups: channels are whitened in this many groups of C / groups; more groups need fewer samples.
        eps: ε > 0, added to the eigenvalues of P; raised to the rounding of P, eps · tr P in the dtype of the
            statistics, if it is less. Where P is rank-deficient, the directions without variance rotate as the weights
            change, and evaluation agrees with training only if ε is large compared to the variance that they gain
            within the averaging window of the running covariance: ``relative=True, eps=1e-2`` is safe there; with
            1e-5, recompute the statistics before evaluation (:func:`update_statistics`).
        momentum: weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: learn γ and β (C each).
        track_running_stats: keep running statistics for evaluation; without, evaluation uses the batch's.
        solver: of the inverse square root, a name of :data:`wellcond.linalg.SOLVERS`, ``"auto"`` or a solver object
            (:class:`IterNorm2d` has its own).
        running: ``"covariance"`` or ``"whitening"``, see the module's page; the buffer is ``running_cov`` or
            ``running_whitening``, (groups, C / groups, C / groups).
        sync: in training, compute the statistics over all processes of ``process_group``, as
            :class:`torch.nn.SyncBatchNorm` does; local where no process group is initialised. A process may have an
            empty batch.
        method: ``"zca"``; ``"cholesky"``, the inverse of the triangular factor; or ``"pca"``, the principal axes in
            the order of falling variance, the largest entry of each positive. In training PCA axes change places from
            batch to batch where variances meet (stochastic axis swapping, Huang et al. 2018); evaluation has the axes
            of the running covariance, in the same convention.
        relative: take ε in units of each group's mean variance tr P · groups / C.
        process_group: of ``torch.distributed``; None for the default one.
        device, dtype: of parameters and statistics; statistics are never below float32, also after ``.half()``, since
            a covariance in half precision has no inverse root to speak of.

    Shape: (N, C, H, W) to the same, in the same dtype and memory format; half precision and autocast are computed in
    float32. Float32 input may have any mean: statistics do not lose digits to it, and a channel whose variance is at
    most (eps·mean)² is constant: it becomes β. With ``relative=True`` a batch may also be of any scale (where values
    are read, on the CPU by default, and without ``sync``); to be tracked, its covariance must fit the dtype.

    Raises:
        TypeError: ``groups`` is no integer (a batch norm has ε in this place); input of no real floating dtype.
        ValueError: groups not dividing num_features; arguments that do not go together; wrong number of dimensions or
            channels; fewer than two values per channel in training, none among them (which batch norm counts as a
            step); NaN or infinity in the input, a covariance beyond the dtype (naming the layer; checked on the CPU by
            default).
        DecompositionError: the covariance could not be decomposed by any step of the fall-back chain.

    Complexity: two products of C × C/groups by C × N·L forward and three backward, O(C³/groups²) for the decomposition;
    no copy of the activations is made. Evaluation is one affine map (:meth:`evaluation_map`). Its matrix is recomputed
    when statistics or options have changed; they are compared by value, which costs C²/groups and on an accelerator
    makes the host wait. Compiled and CUDA graphs read the matrix from a buffer, which ``eval()``, loading a state dict
    and evaluation outside a graph update: call ``eval()`` after writing to ``running_cov``. Exported programs
    (``torch.export``, ``torch.jit.trace``, ONNX) contain a copy of it.

    Tools that recognise batch norm by its class (``isinstance(layer, nn.modules.batchnorm._BatchNorm)``) recognise this
    one: ``torch.optim.swa_utils.update_bn`` recomputes its statistics, ``torch.func.replace_all_batch_norm_modules_``
    removes them, fine-tuning freezes it. ``torch.fx`` traces it as one node, like layers of torch. ``running_var`` is
    the diagonal of ``running_cov``, so that Lightning's ``StochasticWeightAveraging`` resets and recomputes the
    statistics. ``SyncBatchNorm.convert_sync_batchnorm``, and with it ``Trainer(sync_batchnorm=True)``, would replace it
    by a plain batch norm and raises an error instead: use :func:`convert_sync`. timm's ``distribute_bn`` goes by buffer
    names and averages only ``running_mean``: train with ``sync=True``, so that all processes have the same statistics.
    ``torch.jit.trace`` is supported, ``torch.jit.script`` is not.

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
    """Whiten the channels of volumes: :class:`DecorrelatedBatchNorm2d` for inputs (N, C, D, H, W).

    The arguments are those of that class.

    Shape: (N, C, D, H, W) to the same, in the same dtype and memory format; half precision and autocast are computed in
    float32.

    Raises:
        TypeError: ``groups`` is no integer; input of no real floating dtype.
        ValueError: groups not dividing num_features; arguments that do not go together; wrong number of dimensions or
            channels; fewer than two values per channel in training; NaN or infinity in the input (checked on the CPU by
            default).
        DecompositionError: the covariance could not be decomposed by any step of the fall-back chain.

    Complexity: two products of C × C/groups by C × N·L forward and three backward, with L positions per sample, and
    O(C³/groups²) for the decomposition. Source: Huang et al., Decorrelated Batch Normalization, CVPR 2018.

    Example:
        >>> import torch
        >>> DecorrelatedBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    _dims = (5,)


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether it is a batch norm of torch, or of a subclass, and not a decorrelated one."""
    return isinstance(layer, BatchNorm) and not isinstance(layer, _DecorrelatedBatchNorm)
