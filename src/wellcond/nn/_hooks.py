"""What a module does besides its class: hooks, and a forward function of the instance, may do anything."""

from __future__ import annotations

from torch import nn

_CALLED = "_forward_pre_hooks", "_forward_hooks"
_CARRIED = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward pass calls hooks, other than those of the monitor, which are inert in a copy of the model."""
    return any(not getattr(hook, "is_inert", False) for name in _CALLED for hook in getattr(module, name).values())


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward function, in place of that of its class."""
    return "forward" in vars(module)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` call the hooks of ``old``, those of forward and backward passes; their handles remove them there."""
    new.__dict__.update({name: value for name, value in vars(old).items() if name.startswith(_CARRIED)})
