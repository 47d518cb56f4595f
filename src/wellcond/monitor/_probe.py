"""What the monitor observes: the inputs of the spectral layers, or of any named layers.

A hook belongs to one model. In a deep copy or a pickle of the model (an EMA, a worker, ``torch.save``) it is inert: it
neither copies the monitor nor reports to it, and removes itself when called.
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
    """A hook that is inert in copies of the model, where it only removes itself."""

    def __init__(self, function: Any = None) -> None:
        self.function = function

    @property
    def is_inert(self) -> bool:
        """Whether it does nothing, so that a module with it may be replaced by another."""
        return self.function is None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.function is not None:
            self.function(*args, **kwargs)
        elif not is_compiling():  # a compiled graph must not change the module
            self._remove_from(args[0])

    def _remove_from(self, module: nn.Module) -> None:
        # PyTorch iterates over a copy of these dictionaries, so a hook may remove itself.
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(module, name, {})
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                getattr(module, f"{name}_with_kwargs", {}).pop(key, None)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return (Hook, ())


def solver_counts(layer: nn.Module) -> tuple[int, int]:
    """Failures and retries of a layer's solver so far; zero for an ordinary layer."""
    events = getattr(layer, "solver_events", None)
    return (0, 0) if events is None else (events.failures, events.retries)


def watched_layers(model: nn.Module, layers: Layers | None) -> dict[str, nn.Module]:
    """The layers to monitor, by bare name: the given ``layers``, or all spectral layers."""
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
    """Call ``look(module, args, kwargs)`` at the start of each training-mode forward pass."""
    untraced: Any = torch.compiler.disable(look)  # it reads the step, which changes with every call

    def look_in_training(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training:
            untraced(layer, args, kwargs)

    return module.register_forward_pre_hook(Hook(look_in_training), with_kwargs=True)


def observed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, float]:
    """Features (..., d, n) and ε of a layer called with these arguments.

    A layer with a method ``observed_features`` returns them itself. For any other layer they are the input
    (N, C, *spatial) as C × (N·L) and the layer's ``eps``, or 0; if it normalises the last dimensions
    (``normalized_shape``, as in a layer norm), those are the features.

    Args:
        layer: any module.
        args: the positional arguments of its forward pass.
        kwargs: its keyword arguments.

    Returns:
        The features (..., d, n), and ε.

    Example:
        >>> import torch
        >>> from wellcond.monitor import observed_features
        >>> features, eps = observed_features(torch.nn.BatchNorm2d(3), (torch.randn(2, 3, 4, 4),), {})
        >>> features.shape, eps
        (torch.Size([3, 32]), 1e-05)
    """
    observed_features = getattr(layer, "observed_features", None)
    if observed_features is not None:
        features, eps = observed_features(*args, **kwargs)
        return features.detach(), float(eps)
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ValueError(
            f"the input of {type(layer).__name__} is not a tensor (N, C, ...) with features to monitor, "
            f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    eps = getattr(layer, "eps", 0.0)
    eps = float(eps) if isinstance(eps, (int, float)) else 0.0
    shape = tuple(getattr(layer, "normalized_shape", ()))
    if shape and x.shape[-len(shape) :] == shape and x.ndim > len(shape):
        return x.detach().flatten(0, -len(shape) - 1).flatten(1).mT, eps
    return x.detach().transpose(0, 1).flatten(1), eps
