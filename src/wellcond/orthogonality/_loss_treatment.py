"""Treatments in the loss: a term of the weights, which the training loop adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._matrix import MatrixView, Target, targets
from ._registry import Applied, TreatmentClass
from ._sharded import whole

Layers = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module]


class LossTreatment(Applied, TreatmentClass):
    """Base of the treatments in the loss: ``loss + treatment()`` adds the sum of ``term`` over the layers.

    Derived classes have ``treatment``, what messages call it, and ``term``.

    Args:
        layers: layers with a matrix-like ``weight`` (the one in use, if it is parametrised): one, a list, or a dict.
    """

    place: ClassVar[int] = 1
    _treated: ClassVar[WeakSet[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._treated = WeakSet()

    def __init__(self, layers: Layers) -> None:
        if isinstance(layers, nn.Module):
            layers = [layers]
        named = layers if isinstance(layers, Mapping) else {str(i): layer for i, layer in enumerate(layers)}
        views = [target.view for target in targets(named)]
        self._layers: list[tuple[nn.Module, MatrixView]] = list(zip(named.values(), views, strict=True))

    def term(self, W: Tensor) -> Tensor:
        """The term of one layer, a scalar, from its weight (groups, m, n) in float32 or better."""
        raise NotImplementedError

    def __call__(self) -> Tensor:
        """The sum of the terms at the present weights, a scalar with a gradient."""
        return torch.stack([self._term(layer, view) for layer, view in self._layers]).sum()

    def _term(self, layer: nn.Module, view: MatrixView) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight = whole(weight)
        with torch.autocast(weight.device.type, enabled=False):
            return self.term(view.matrix(weight.to(torch.promote_types(weight.dtype, torch.float32))))

    @classmethod
    def require_free(cls, layer: nn.Module, target: Target) -> None:
        if layer in cls._treated:
            raise ValueError(f"treatment '{cls.name}' of {target.where} is already on; call .remove() on the first")

    @classmethod
    def apply_to(cls, optimizer: Optimizer, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Applied:
        applied = cls(layers, **options)
        cls._treated.update(layers.values())
        return applied

    def remove(self) -> None:
        self._treated.difference_update(layer for layer, _ in self._layers)
