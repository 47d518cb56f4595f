"""What the adapters share: which treatments act on weights and which in a step, and the gradient of the loss term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.orthogonality import Treatment, orthogonal_weight, spectral_norm
from wellcond.orthogonality._parametrised import chain
from wellcond.orthogonality.orthogonal_weight import OrthogonalWeight
from wellcond.orthogonality.spectral_norm import SpectralNorm

_ON_WEIGHTS: dict[str, Any] = {
    "ow": (orthogonal_weight, OrthogonalWeight),
    "sn": (spectral_norm, SpectralNorm),
}


def split_treatments(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those that a weight is made for (in the order in which they are put on), and those that act in a step."""
    names = list(names)
    return [name for name in _ON_WEIGHTS if name in names], [name for name in names if name not in _ON_WEIGHTS]


def treat_weights(
    layers: Mapping[str, nn.Module], names: Iterable[str], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put ``ow`` and ``sn`` on the weights of ``layers``."""
    for treatment in names:
        for name, layer in layers.items():
            _ON_WEIGHTS[treatment][0](layer, name=name, **options.get(treatment, {}))


def weights_treated(layers: Mapping[str, nn.Module], names: Iterable[str]) -> bool:
    """Whether all of these treatments are on every layer's weight already."""
    kinds = [_ON_WEIGHTS[name][1] for name in names]
    return all(any(isinstance(p, kind) for p in chain(layer)) for layer in layers.values() for kind in kinds)


def add_loss_gradient(handle: Treatment, scale: Tensor | float | None = None) -> None:
    """Add the gradient of the ``ol`` term to that of the weights, ``scale`` times where those are scaled still."""
    if handle.ol is None:
        return
    with torch.enable_grad():
        loss = handle.loss()
        with torch.autocast(loss.device.type, enabled=False):
            if scale is not None:
                loss = loss * scale
            weights = [p for layer in handle.layers.values() for p in layer.parameters() if p.requires_grad]
            if not loss.requires_grad:  # the weights are frozen, or toggled off in this step
                return
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
