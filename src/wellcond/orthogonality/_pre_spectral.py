"""The pre-spectral layers: the last layers with a weight before a spectral layer.

The paper calls it the "Pre-SVD layer". What lies between (batch norm, activation, pooling, the sum of a residual block)
has no matrix to treat and is skipped; where paths join, each contributes its own layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from wellcond._shared.models import bare_name, is_spectral, layers_by_name, unwrapped

from ._autograd_walk import layers_by_running
from ._symbolic_walk import layers_by_tracing
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
