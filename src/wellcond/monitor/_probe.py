"""Where the monitor looks: the spectral layers of a model, or the inputs of any layer named.

A probe belongs to one model. A deep copy or a pickle of the model (an EMA, a worker, ``torch.save``) carries the
hook along without effect, so that it neither copies the monitor nor reports to it; called, it takes itself off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wellcond._shared.models import Layers, bare_name, is_spectral, layers_by_name, unwrapped
from wellcond._shared.torch_internals import is_compiling


class Hook:
    """A callable that the copies of a model do not inherit: there it does nothing but take itself off."""

    def __init__(self, function: Any = None) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.function is not None:
            self.function(*args, **kwargs)
        elif not is_compiling():  # a graph must not change the module; without effect it costs nothing
            self._leave(args[0])

    def _leave(self, module: nn.Module) -> None:
        # PyTorch calls hooks from a copy of these, so that a hook may remove itself.
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(module, name, {})
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                getattr(module, f"{name}_with_kwargs", {}).pop(key, None)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return (Hook, ())


def solver_counts(layer: nn.Module) -> tuple[int, int]:
    """Failures and retries of a layer's solver so far; none for an ordinary layer."""
    events = getattr(layer, "solver_events", None)
    return (0, 0) if events is None else (events.failures, events.retries)


def watched_layers(model: nn.Module, layers: Layers | None) -> dict[str, nn.Module]:
    """The layers to watch, by their bare names: every spectral layer, or those that ``layers`` names or holds."""
    if layers is not None:
        return layers_by_name(model, layers)
    found = {bare_name(name): module for name, module in unwrapped(model).named_modules() if is_spectral(module)}
    if not found:
        raise ValueError(
            f"the model ({type(model).__name__}) has no spectral layer (a module with is_spectral_layer = True) "
            "to monitor; name ordinary layers with layers=['bn1', ...] to watch their input instead"
        )
    return found


def attach(module: nn.Module, look: Callable[..., None]) -> RemovableHandle:
    """Call ``look(module, args, kwargs)`` at the begin of each training-mode forward pass."""
    untraced: Any = torch.compiler.disable(look)  # it reads the step, which changes with every call

    def entered(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training:  # without running statistics, evaluation takes batch statistics too
            untraced(layer, args, kwargs)

    return module.register_forward_pre_hook(Hook(entered), with_kwargs=True)


def observed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, float]:
    """Features (..., d, n) and ε: what ``layer.observed_features`` says of these arguments, for a layer that has it.

    Of any other layer the input (N, C, *spatial) as C × (N·L), with its ``eps`` if it has one (a batch norm's), or 0;
    of one that normalises the last dimensions (``normalized_shape``, a layer norm's), those as its features.

    Args:
        layer: any module.
        args: the positional arguments of its forward pass.
        kwargs: those by keyword.

    Returns:
        The features (..., d, n), and ε.

    Example:
        >>> import torch
        >>> from wellcond.monitor import observed_features
        >>> features, eps = observed_features(torch.nn.BatchNorm2d(3), (torch.randn(2, 3, 4, 4),), {})
        >>> features.shape, eps
        (torch.Size([3, 32]), 1e-05)
    """
    own = getattr(layer, "observed_features", None)
    if own is not None:
        features, eps = own(*args, **kwargs)
        return features.detach(), float(eps)
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ValueError(
            f"the input of {type(layer).__name__} is not a tensor (N, C, ...) with features to monitor, "
            f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    eps = getattr(layer, "eps", 0.0)
    eps = float(eps) if isinstance(eps, (int, float)) else 0.0
    last = tuple(getattr(layer, "normalized_shape", ()))
    if last and x.shape[-len(last) :] == last and x.ndim > len(last):
        return x.detach().flatten(0, -len(last) - 1).flatten(1).mT, eps
    return x.detach().transpose(0, 1).flatten(1), eps
