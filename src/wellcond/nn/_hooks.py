"""What a module does besides its class: hooks, and a forward function of the instance, may do anything."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

_CALLED = "_forward_pre_hooks", "_forward_hooks"
_CARRIED = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward pass calls hooks, other than those of the monitor, which are inert in a copy of the model."""
    return any(not getattr(hook, "is_inert", False) for name in _CALLED for hook in getattr(module, name).values())


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward function, in place of that of its class."""
    return "forward" in vars(module)


def carried_hooks(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that hold its hooks of forward and backward passes."""
    return {name: value for name, value in vars(module).items() if name.startswith(_CARRIED)}


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` call the hooks of ``old``, those of forward and backward passes; their handles remove them there."""
    new.__dict__.update(carried_hooks(old))


def add_hooks_around(wrapper: nn.Module, new: nn.Module) -> None:
    """Let ``new`` call the hooks of a module that was around it too, before and after its own. The handles of the
    wrapper's remove them there, unless ``new`` has some of that kind."""
    for name, outer in carried_hooks(wrapper).items():
        own = getattr(new, name)
        if outer and own and isinstance(outer, dict):
            outer = OrderedDict([*outer.items(), *own.items()] if "_pre_" in name else [*own.items(), *outer.items()])
        new.__dict__[name] = outer or own
