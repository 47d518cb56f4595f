"""Replacing batch norm by decorrelated batch norm in an existing model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from wellcond._shared.models import bare_name, evaluating, run_example, unwrapped
from wellcond._shared.names import listed, require_known

from ._base import replace_modules
from ._batchnorm_classes import DECORRELATED, applied_after, batchnorms, reasons
from ._hooks import carry_hooks
from ._norm_and_tail import NormAndTail

Which = Literal["first", "all"] | Callable[[str, nn.Module], bool]


def replace_batchnorm(
    model: nn.Module,
    which: Which = "first",
    *,
    group_size: int | None = None,
    example_input: Any = None,
    **options: Any,
) -> list[str]:
    """Replace ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` in a model by the decorrelated one, in place.

    Weight, bias, ε, momentum, mode, device and dtype are kept; the running covariance starts as the diagonal of the
    running variances, so that evaluation is unchanged until the first training step. The weight and bias stay the same
    ``Parameter`` objects, so that an existing optimizer keeps working. Hooks of forward and backward passes go on. A
    ``SyncBatchNorm`` becomes a :class:`DecorrelatedBatchNorm2d` with ``sync=True`` over the same process group. A norm
    that also applies dropout or an activation, such as timm's ``BatchNormAct2d`` or a class registered by
    :func:`register_batchnorm`, keeps them: the decorrelated one becomes its submodule ``norm``. One that is itself
    compiled by ``torch.compile`` is replaced together with what compiles it, by a layer that is not compiled.

    Args:
        model: any module. The paper replaces the norm after the first convolution, ``which="first"``.
        which: ``"first"``, in the order of ``named_modules`` or, with an ``example_input``, of computation; ``"all"``;
            or a predicate of name and module.
        group_size: channels per group, instead of ``groups``, for models whose norms differ in their number of
            channels. Where it does not divide that number, the next smaller divisor is used.
        example_input: an input to call the model with (once, in evaluation mode and without gradients): a tensor, a
            tuple of arguments, or a dict of keyword arguments.
        **options: of :class:`DecorrelatedBatchNorm2d`, such as ``groups`` or ``eps``; they override those of the batch
            norm.

    Returns:
        The names of the new norms in the model.

    Raises:
        ValueError: no batch norm can be replaced, ``which`` chose none, or the model is itself a batch norm; with
            ``"first"``, an earlier norm cannot be replaced (the message says why and what to do); both ``groups`` and
            ``group_size``; the model does not run on the example.

    With ``"all"`` norms that cannot be replaced are named in a warning.

    Complexity: O(C²/groups) memory for each norm; one forward pass with an ``example_input``.
    Source: Song, Sebe and Wang, ECCV 2022, sect. 6.1, for replacing the first norm; Huang et al., CVPR 2018.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> replace_batchnorm(model, group_size=16)
        ['1']
        >>> model[1].groups
        4
    """
    norms, others = batchnorms(model)
    if any(not bare_name(name) for name in norms):
        kind = type(unwrapped(model)).__name__
        raise ValueError(f"{kind} is a batch norm itself; make a decorrelated one, or wrap it first")
    if group_size is not None and "groups" in options:
        raise ValueError(f"give groups or group_size, not both: {options['groups']}, {group_size}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if not norms:
        why = f" ({reasons(others)})" if others else ""
        raise ValueError(f"{type(model).__name__} holds no nn.BatchNorm1d, 2d, 3d or SyncBatchNorm to replace{why}")
    if callable(which):
        chosen = [name for name, module in norms.items() if which(name, module)]
    else:
        require_known(which, ("first", "all"), "which", ", which may also be a function of name and module")
        chosen = list(norms) if which == "all" else _first(model, norms, others, example_input)
        if which == "all" and others:
            warnings.warn(f"not replaced: {reasons(others)}", stacklevel=2)
    if not chosen:
        raise ValueError(f"which chose none of the batch norms {listed(norms)}")
    new = {norms[name]: _decorrelated(norms[name], group_size, options) for name in chosen}
    replace_modules(model, new)
    names = {module: name for name, module in model.named_modules()}
    return [names[m.norm if isinstance(m, NormAndTail) else m] for m in new.values()]


def _decorrelated(old: Any, group_size: int | None, options: Mapping[str, Any]) -> nn.Module:
    """The replacement of ``old``."""
    C = old.num_features
    groups = {} if group_size is None else {"groups": next(g for g in range(-(-C // group_size), C + 1) if C % g == 0)}
    norm = DECORRELATED[type(old)].from_batchnorm(old, **options, **groups)
    if norm.weight is not None and old.weight is not None:
        norm.weight, norm.bias = old.weight, old.bias
    tail = applied_after(old)
    new = NormAndTail(norm, tail, old) if tail else norm
    carry_hooks(old, new)
    return new


def _first(
    model: nn.Module, norms: Mapping[str, nn.Module], others: Mapping[str, str], example_input: Any
) -> list[str]:
    order = [name for name, _ in model.named_modules() if name in norms or name in others]
    if example_input is not None:
        order = _in_order_of_computation(model, order, example_input)
    if order and order[0] in others:
        raise ValueError(
            f"the first norm of {type(model).__name__}, {reasons({order[0]: others[order[0]]})}; or choose another one "
            "by which=, a function of name and module"
        )
    return order[:1]


@torch.no_grad()
def _in_order_of_computation(model: nn.Module, names: list[str], example_input: Any) -> list[str]:
    """The modules that the model calls, in the order of the calls."""
    called: dict[str, None] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name in names
    ]
    try:
        with evaluating(model):
            run_example(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
