"""Statistics over all processes, in every norm of a model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from wellcond._shared.models import without_compile

from ._base import replace_modules
from ._batchnorm_classes import applied_after, batchnorms, reasons
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._hooks import carry_hooks, has_own_forward
from ._norm_and_tail import NormAndTail
from .decorrelated_batchnorm import is_batchnorm


def convert_sync(module: nn.Module, process_group: Any = None, *, batchnorm: bool = False) -> nn.Module:
    """Let every decorrelated batch norm in a model compute its statistics over all processes, as
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does for batch norms.

    Args:
        module: the model, or one layer; changed in place.
        process_group: of ``torch.distributed``; None for the default one, looked up in every forward pass.
        batchnorm: convert torch's batch norms too. (``convert_sync_batchnorm``, and what calls it, such as
            ``Trainer(sync_batchnorm=True)`` of Lightning, stops at a decorrelated one.) A norm that goes on after it
            has normalised, such as timm's ``BatchNormAct2d`` or a class registered by :func:`register_batchnorm`, keeps
            what it applies: the synchronised one becomes its submodule ``norm``. Others that may do more than
            normalise are left, and named in a warning.

    Returns:
        The module; a new one if it is itself a batch norm of torch and ``batchnorm`` is set.

    Example:
        >>> from torch import nn
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> convert_sync(nn.Sequential(DecorrelatedBatchNorm2d(3)))[0].sync
        True
    """
    for layer in module.modules():
        if isinstance(layer, _DecorrelatedBatchNorm):
            layer.sync, layer.process_group = True, process_group
    if not batchnorm:
        return module
    norms, others = batchnorms(module)
    unregistered = {name: layer for name in others if is_batchnorm(layer := module.get_submodule(name))}
    norms |= {name: layer for name, layer in unregistered.items() if _only_normalises(layer)}
    synchronised = {name for name, layer in unregistered.items() if isinstance(layer, nn.SyncBatchNorm)}
    if left := {name: others[name] for name in unregistered if name not in norms and name not in synchronised}:
        warnings.warn(f"not synchronised: {reasons(left)}", stacklevel=2)
    new = {norm: _synchronised(norm, process_group) for norm in norms.values()}
    replace_modules(module, new)
    return new.get(without_compile(module), module)


def _only_normalises(norm: Any) -> bool:
    """Whether it runs the code of torch's batch norm, and has channels."""
    if has_own_forward(norm) or not norm.num_features:
        return False
    return type(norm).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward)


def _synchronised(old: nn.Module, process_group: Any) -> nn.Module:
    """The replacement of a batch norm."""
    new = norm = nn.SyncBatchNorm.convert_sync_batchnorm(old, process_group)
    if tail := applied_after(old):
        for name in tail:
            delattr(norm, name)
        new = NormAndTail(norm, tail, old)
    carry_hooks(old, new)
    return new
