"""A decorrelated batch norm in place of one that applies more than normalisation, such as timm's BatchNormAct2d."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ._hooks import carry_hooks


class NormAndTail(nn.Module):
    """A norm, then submodules of the norm that it replaces, under their names there.

    It loads state dicts of the original model, whose ``bn1.weight`` is ``bn1.norm.weight`` here.

    Args:
        norm: the decorrelated batch norm.
        tail: the modules applied after it, by name.
        replaced: the original batch norm, whose class and plain attributes are kept for :meth:`restored`.
    """

    def __init__(self, norm: nn.Module, tail: dict[str, nn.Module], replaced: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        for name, module in tail.items():
            self.add_module(name, module)
        # In a tuple, so that it is not registered as a submodule.
        self._shell = (_emptied(replaced),)
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x

    def restored(self, norm: nn.Module) -> nn.Module:
        """A module of the class that was replaced, with the parameters and buffers of a batch norm of torch."""
        new: Any = _emptied(self._shell[0])
        new._parameters, new._buffers = norm._parameters.copy(), norm._buffers.copy()
        new._modules = {name: module for name, module in self.named_children() if name != "norm"}
        carry_hooks(self, new)
        new.eps, new.training = getattr(norm, "eps", new.eps), norm.training
        return new

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        state_dict, prefix = args[:2]
        own = {f"{name}." for name, _ in self.named_children()}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            leaf = key[len(prefix) :]
            if not any(leaf.startswith(name) for name in own) and "." not in leaf:
                state_dict[f"{prefix}norm.{leaf}"] = state_dict.pop(key)
        super()._load_from_state_dict(*args)


def _emptied(module: nn.Module) -> nn.Module:
    """A shallow copy without parameters, buffers, submodules and hooks."""
    new: Any = copy.copy(module)
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or name.endswith("_hooks"):
            new.__dict__[name] = type(value)()
    return new
