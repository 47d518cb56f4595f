"""The pre-spectral layers: the last layers with a weight before a spectral layer.

The paper calls it the "Pre-SVD layer". What lies between (batch norm, activation, pooling, the sum of a residual block)
has no matrix to treat and is skipped; where paths join, each contributes its own layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from wellcond._shared.models import bare_name, is_spectral, layers_by_name, unwrapped

from ._autograd_walk import layers_by_running
from ._symbolic_walk import layers_before_each, layers_by_tracing
from ._walk_back import NAME_LAYERS


def pre_spectral_layers(model: nn.Module, example_input: Any = None, *, of: str | None = None) -> dict[str, nn.Module]:
    """Find the layers that feed the spectral layers of a model.

    Without an example the forward function is traced symbolically (``torch.fx``). If its control flow depends on the
    data (as in checks of the input's shape), every branch is followed, and those that do not raise must agree. With an
    example the model is run once in evaluation mode and the autograd graph is followed back from the input of every
    spectral layer, which works for any model whose layers autograd sees. The model is left unchanged.

    Args:
        model: any module; spectral layers are those with a true attribute ``is_spectral_layer``.
        example_input: the input to call the model with: a tensor, a tuple of arguments, or a dict (or another mapping)
            of keyword arguments.
        of: the name of one layer of any kind: return only the layers before it.

    Returns:
        The layers by their names in ``model.named_modules()``, without the ``_orig_mod`` of compiled parts, in that
        order.

    Raises:
        ValueError: no spectral layer (or none with the name ``of``), no layer with a weight before it, or a model that
            could not be followed (as where a checkpoint with ``use_reentrant=True`` hides layers from autograd); the
            message gives the reason and what to do.

    Complexity: at most 64 symbolic traces, or one forward pass. Source: the Pre-SVD layer of Song, Sebe and Wang, ECCV
    2022.

    Example:
        >>> from torch import nn
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), DecorrelatedBatchNorm2d(8), nn.Conv2d(8, 8, 3))
        >>> list(pre_spectral_layers(model))
        ['0']
    """
    if of is None:
        spectral = {name: m for name, m in model.named_modules() if is_spectral(m)}
    else:
        spectral = layers_by_name(model, of)
    if not spectral:
        raise ValueError(
            f"{type(model).__name__} has no spectral layer; put one in (such as wellcond.nn.DecorrelatedBatchNorm2d or "
            f"GlobalCovariancePool2d), or {NAME_LAYERS}"
        )
    if example_input is None:
        found = layers_by_tracing(unwrapped(model), None if of is None else next(iter(spectral.values())))
    else:
        found = layers_by_running(model, list(spectral.values()), example_input)
    if not found:
        raise ValueError(
            "no layer with a matrix-like weight comes before the spectral layer "
            f"{', '.join(repr(name) for name in spectral)}, only the model's input or operations without a weight; "
            f"{NAME_LAYERS}"
        )
    return {bare_name(name): m for name, m in model.named_modules() if m in found}


def layers_before(model: nn.Module, names: str | Iterable[str]) -> dict[str, dict[str, nn.Module]]:
    """Find the layers that feed each of several layers of any kind, as far as tracing shows them.

    It is :func:`pre_spectral_layers` with ``of=`` for each name, but traces the model once for all layers that are a
    module of PyTorch, spectral or without parts. Where the model cannot be traced (a LightningModule, control flow on
    data), the part of it that contains the layer is tried, then the part of that, and so on, so that a layer before
    that part is not seen.

    Args:
        model: any module; it is left unchanged.
        names: of layers in ``model.named_modules()``, with or without the ``_orig_mod`` of compiled parts.

    Returns:
        For each of the names, in their order, the layers before it by their names; none where nothing was found.

    Raises:
        ValueError: a name that is not in the model (the message has the nearest one).

    Complexity: at most 64 symbolic traces of the model, and of each part that contains a layer for which the whole
    was not enough; as many again for each layer of another class that has parts. Source: as
    :func:`pre_spectral_layers`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> {name: list(layers) for name, layers in layers_before(model, ["1", "3"]).items()}
        {'1': ['0'], '3': ['2']}
    """
    names = [names] if isinstance(names, str) else list(names)
    paths: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    for name in names:
        ((paths[name], modules[name]),) = layers_by_name(model, name).items()
    model = unwrapped(model)
    found: dict[str, dict[str, nn.Module]] = {name: {} for name in names}
    depth, still = 0, list(modules)
    while still:
        parts: dict[str, list[str]] = {}
        for name in still:
            path = paths[name].split(".")
            if depth < len(path):
                parts.setdefault(".".join(path[:depth]), []).append(name)
        for place, inside in parts.items():
            part = model.get_submodule(place)
            before = layers_before_each(unwrapped(part), [modules[name] for name in inside])
            inner = {m: bare_name(name) for name, m in part.named_modules()}
            for name in inside:
                layers = sorted(before.get(modules[name], ()), key=[*inner].index)
                found[name] = {".".join(filter(None, (place, inner[m]))): m for m in layers}
        still = [name for inside in parts.values() for name in inside if not found[name]]
        depth += 1
    return found
