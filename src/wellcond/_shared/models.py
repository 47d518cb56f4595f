"""Models without their wrappers: names of layers, the mark of a spectral layer, and look-up of layers by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from .names import choices
from .torch_internals import uncompiled

INNER = ("optimizer", "base_optimizer", "_base_optimizer")

_EVALUATED: WeakSet[nn.Module] = WeakSet()

Layers = Iterable[str | nn.Module] | str | nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and ``torch.compile``, whose own forward functions cannot be traced."""
    while isinstance(model := without_compile(model), (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def without_compile(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, however often that was applied; any other module itself."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode in which it was.

    It goes through ``train()``, which models override: LeViT keeps in evaluation what it computes from its weights, and
    forgets it there.
    """
    modes = {module: module.training for module in model.modules()}
    entered = set(modes) - set(_EVALUATED)
    try:
        _EVALUATED.update(entered)
        model.eval()
        yield
    finally:
        _EVALUATED.difference_update(entered)
        model.train()
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


def is_evaluated(module: nn.Module) -> bool:
    """Whether :func:`evaluating` is on, also for a module in training mode there: no pass is one of training."""
    return module in _EVALUATED


def run_example(model: nn.Module, example_input: Any, otherwise: str = "") -> Any:
    """The output of a model for a tensor, a tuple of arguments or a mapping of keyword arguments.

    Its compiled parts run in Python. Compiled, they would not call the hooks by which their layers are watched, or
    would trace them.

    Raises:
        ValueError: the model raised any error; ``otherwise`` ends the message.
    """
    args: tuple[Any, ...] = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with uncompiled():
            return model(**example_input) if isinstance(example_input, Mapping) else model(*args)
    except Exception as error:  # the model's code may raise anything
        raise ValueError(
            f"{type(model).__name__} could not be run on the example input ({type(error).__name__}: {error}); give one "
            f"that it accepts{otherwise}"
        ) from error


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The ``torch.optim`` optimizer whose ``step`` updates the weights, inside any wrappers.

    Lightning and Accelerate keep it as ``.optimizer``, SAM and Lookahead as ``.base_optimizer``.
    """
    while inner := next((o for name in INNER if isinstance(o := getattr(optimizer, name, None), Optimizer)), None):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def bare_name(name: str) -> str:
    """The name of a module in a model without ``torch.compile``, whose parts have ``_orig_mod`` in their names."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_spectral(module: nn.Module) -> bool:
    """Whether a module declares itself a spectral layer."""
    return bool(getattr(module, "is_spectral_layer", False))


def described(layer: nn.Module, name: str) -> str:
    """``layer 'conv1' (Conv2d)``; a parametrised layer is named by its original class."""
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    return f"layer '{name}' ({kind.__name__})"


def as_given(layers: Layers | None) -> list[str | nn.Module] | None:
    """One or several layers as a list, which unlike an iterator can be read again; None for None."""
    return [layers] if isinstance(layers, (str, nn.Module)) else layers if layers is None else list(layers)


def layers_by_name(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The layers that ``layers`` names or contains, by their names in the unwrapped model, in the given order.

    Names may be those of the wrapped or of the unwrapped model, and any of a module that has several.

    Raises:
        ValueError: a name or module that is not in the model (with the nearest existing name), or no layer at all.
    """
    inner = unwrapped(model)
    found = {bare_name(name): module for name, module in inner.named_modules()}
    everywhere = [*model.named_modules(remove_duplicate=False), *inner.named_modules(remove_duplicate=False)]
    aliases = dict(everywhere) | {bare_name(name): module for name, module in everywhere} | found
    names = {id(module): name for name, module in reversed(found.items())}
    chosen: dict[str, nn.Module] = {}
    for layer in as_given(layers) or ():
        module = aliases.get(layer) if isinstance(layer, str) else layer
        name = names.get(id(module))
        if module is None or name is None:
            kind = type(inner).__name__
            if isinstance(layer, str):
                raise ValueError(f"the model ({kind}) has no layer '{layer}'{choices(layer, found)}")
            raise ValueError(f"the layer {type(layer).__name__} is not a part of the model ({kind})")
        chosen[name] = module
    if not chosen:
        raise ValueError("layers is empty: name at least one layer, or leave it out")
    return chosen
