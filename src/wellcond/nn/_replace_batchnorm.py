"""Putting decorrelated batch norm into a finished model, in the place of batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from wellcond._shared.names import listed, require_known

from ._base import replace_modules
from .decorrelated_batchnorm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    is_batchnorm,
)

DECORRELATED = {
    nn.BatchNorm1d: DecorrelatedBatchNorm1d,
    nn.BatchNorm2d: DecorrelatedBatchNorm2d,
    nn.BatchNorm3d: DecorrelatedBatchNorm3d,
    # Which takes any number of dimensions; models that are trained in several processes are of images.
    nn.SyncBatchNorm: DecorrelatedBatchNorm2d,
}
Which = Literal["first", "all"] | Callable[[str, nn.Module], bool]


def replace_batchnorm(model: nn.Module, which: Which = "first", **options: Any) -> list[str]:
    """Replace ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` in a model by the decorrelated one, in place.

    Weight, bias, ε, momentum, mode, device and dtype are kept; the running covariance starts as the diagonal of the
    running variances, so that evaluation is unchanged until the first training step. The weight and bias are the same
    ``Parameter`` objects: an optimizer goes on with them. A ``SyncBatchNorm`` becomes a
    :class:`DecorrelatedBatchNorm2d` with ``sync=True`` over the same process group.

    Args:
        model: any module. The paper replaces the norm after the first convolution, ``which="first"``.
        which: ``"first"`` in the order of ``named_modules``, ``"all"``, or a function of name and module that says yes.
        **options: of :class:`DecorrelatedBatchNorm2d`, such as ``groups`` or ``eps``; they go before what the batch
            norm had.

    Returns:
        The names of the norms that were replaced.

    Raises:
        ValueError: no batch norm of torch's own class is there, ``which`` chose none, or the model is one itself.
            Subclasses may do more than normalise, and are left alone.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> replace_batchnorm(model, groups=4)
        ['1']
    """
    if type(model) in DECORRELATED:
        raise ValueError(f"{type(model).__name__} is a batch norm itself; make a decorrelated one, or wrap it first")
    norms = [(name, module) for name, module in model.named_modules() if type(module) in DECORRELATED]
    if not norms:
        others = sorted({type(m).__name__ for m in model.modules() if is_batchnorm(m)})
        hint = f" ({', '.join(others)} are not replaced: they may do more)" if others else ""
        raise ValueError(f"{type(model).__name__} holds no nn.BatchNorm1d, 2d, 3d or SyncBatchNorm to replace{hint}")
    if callable(which):
        chosen = [(name, module) for name, module in norms if which(name, module)]
    else:
        require_known(which, ("first", "all"), "which", ", which may also be a function of name and module")
        chosen = norms[:1] if which == "first" else norms
    if not chosen:
        raise ValueError(f"which chose none of the batch norms {listed(name for name, _ in norms)}")
    new: dict[nn.Module, nn.Module] = {}
    old: Any
    for _, old in chosen:
        new[old] = norm = DECORRELATED[type(old)].from_batchnorm(old, **options)
        if norm.weight is not None and old.weight is not None:
            norm.weight, norm.bias = old.weight, old.bias
    replace_modules(model, new)
    return [name for name, _ in chosen]
