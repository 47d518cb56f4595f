"""Recomputing running statistics for the final weights.

During training, running statistics lag behind the weights. A whitening layer suffers more from this than batch norm,
since it divides by √ε whatever has moved along directions without variance. Averaged weights (SWA, EMA) have no
statistics at all. For batch norm this is "precise batch norm" (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021)
and ``torch.optim.swa_utils.update_bn``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from wellcond._shared.models import evaluating

from ._decorrelated_batchnorm import _DecorrelatedBatchNorm


@torch.no_grad()
def update_statistics(model: nn.Module, batches: Iterable[Any], *, device: torch.device | str | None = None) -> int:
    """Recompute the running statistics of every batch norm and decorrelated batch norm, averaged over the batches.

    Only the norms are in training mode; everything else, such as dropout, is in evaluation mode. Modes and momenta are
    restored afterwards.

    Args:
        model: any module that is called with a batch.
        batches: of a data loader: inputs, tuples or lists that begin with inputs, or mappings such as a dict, which are
            passed as keyword arguments. A few hundred batches of training data are enough.
        device: to which the batches are moved; None to leave them where they are.

    Returns:
        The number of norms that were updated.

    Raises:
        ValueError: there are norms but no batches; the statistics are not changed.

    Complexity: one forward pass per batch. Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021.

    Example:
        >>> import torch
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), DecorrelatedBatchNorm2d(8))
        >>> update_statistics(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        1
    """

    def moved(value: Any) -> Any:
        return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value

    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {name: b.clone() for name, b in norm.named_buffers(recurse=False)} for norm in norms}
    count = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**{name: moved(value) for name, value in batch.items()})
                else:
                    model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))
                count += 1
        if not count:
            raise ValueError("no batch was given, so there is nothing to compute statistics of")
    except BaseException:
        for norm, buffers in before.items():
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    for norm in norms:
        if isinstance(norm, _DecorrelatedBatchNorm) and not norm.training:
            norm.eval()  # updates the buffer that compiled and exported graphs read
    return len(norms)
