"""The classes of batch norm that can be replaced, and the submodules that each applies after normalising.

torch's own classes only normalise. A subclass may do anything: one that then applies some of its submodules (dropout,
an activation) is registered with their names, and they are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from wellcond._shared.names import listed

from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._hooks import has_own_forward
from .decorrelated_batchnorm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    is_batchnorm,
)

DECORRELATED: dict[type[nn.Module], type[_DecorrelatedBatchNorm]] = {
    nn.BatchNorm1d: DecorrelatedBatchNorm1d,
    nn.BatchNorm2d: DecorrelatedBatchNorm2d,
    nn.BatchNorm3d: DecorrelatedBatchNorm3d,
    # It takes any number of dimensions; models trained in several processes are mostly of images.
    nn.SyncBatchNorm: DecorrelatedBatchNorm2d,
}
"""The replacement of each class of batch norm."""

_THEN: dict[type[nn.Module], tuple[str, ...]] = {}
"""The submodules that a registered class applies after normalising, by name."""


def register_batchnorm(
    kind: type[nn.Module], *, then: Sequence[str] = (), like: type[nn.Module] | None = None
) -> type[nn.Module]:
    """Let :func:`replace_batchnorm` replace a subclass of batch norm of your own; usable as a decorator.

    Args:
        kind: a subclass of ``nn.BatchNorm1d/2d/3d`` or ``nn.SyncBatchNorm`` whose forward pass normalises and then
            applies some of its submodules, one after the other, and does nothing else.
        then: the names of those submodules, in order. Names that a module lacks are skipped.
        like: the class of torch to treat it as, by default the one that it derives from.

    Returns:
        ``kind``.

    Raises:
        TypeError: neither ``kind`` nor ``like`` is a batch norm of torch.
        ValueError: a submodule named ``norm``, the name of the decorrelated one.

    ``BatchNormAct2d`` and ``SyncBatchNormAct`` of timm need not be registered.

    Example:
        >>> import torch
        >>> from wellcond.nn import replace_batchnorm
        >>> class NormAndClip(nn.BatchNorm2d):
        ...     def __init__(self, channels):
        ...         super().__init__(channels)
        ...         self.clip = nn.Hardtanh()
        ...     def forward(self, x):
        ...         return self.clip(super().forward(x))
        >>> _ = register_batchnorm(NormAndClip, then=["clip"])
        >>> replace_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), NormAndClip(8)))
        ['1.norm']
    """
    own = [base for base in (like or kind).__mro__ if base in DECORRELATED]
    if not own:
        raise TypeError(
            f"{(like or kind).__name__} is no nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, nor derived from one: say which "
            "it is like"
        )
    if "norm" in then:
        raise ValueError(f"a submodule of {kind.__name__} cannot be named 'norm': that is the decorrelated one's name")
    DECORRELATED[kind] = DECORRELATED[own[0]]
    _THEN[kind] = tuple(then)
    return kind


def applied_after(norm: nn.Module) -> dict[str, nn.Module]:
    """The submodules of a norm that it applies after normalising, by name and in order."""
    found = {name: getattr(norm, name, None) for name in _THEN.get(type(norm), ())}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def batchnorms(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The batch norms of a model that can be replaced, by name, and the reasons why others cannot, by name."""
    _register_those_of_timm()
    norms, others = {}, {}
    for name, module in model.named_modules():
        if is_batchnorm(module) and not module.num_features:
            others[name] = f"{type(module).__name__} has no channels yet: run one forward pass of the model first"
        elif is_batchnorm(module) and has_own_forward(module):
            others[name] = f"the forward function of this {type(module).__name__} is its own, and may do anything"
        elif type(module) in DECORRELATED:
            norms[name] = module
        elif is_batchnorm(module):
            others[name] = (
                f"{type(module).__name__} is a batch norm that may do more than normalise: if it only applies "
                "submodules of its own afterwards, say which by wellcond.nn.register_batchnorm"
            )
        elif any(base.__name__.startswith("FrozenBatchNorm") for base in type(module).__mro__):
            others[name] = f"{type(module).__name__} is frozen: it has no statistics of the batch to decorrelate"
    return norms, others


def reasons(others: dict[str, str]) -> str:
    """The reasons in one line, each once, with the first few names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in others.items():
        by_reason.setdefault(reason, []).append(name)

    def some(names: list[str]) -> str:
        return listed(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    return "; ".join(f"{some(names)}: {reason}" for reason, names in by_reason.items())


def _register_those_of_timm() -> None:
    """Register timm's classes if timm has been imported."""
    if (layers := sys.modules.get("timm.layers")) is None:
        return
    for name in ("BatchNormAct2d", "SyncBatchNormAct"):
        kind = getattr(layers, name, None)
        if kind is not None and kind not in DECORRELATED:
            register_batchnorm(kind, then=("drop", "act"))
