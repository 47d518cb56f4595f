"""Giving a layer its weight back when the treatments of the weight are removed.

Not with ``torch.nn.utils.parametrize.remove_parametrizations``, which removes the attribute from every deep copy of the
layer too (they share one generated class).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from wellcond._shared.models import described

from ._exchange import exchange, start_afresh
from ._matrix import layer_target, parametrisations
from ._registry import TreatmentClass
from ._sharded import is_sharded


class Restorer:
    """Removes all parametrisations from the weight of ``layer``, which has none yet.

    The layer keeps the weight in use, or, if no step has changed the stored tensor, gets its own back bit for bit. A
    layer that has become one of another class cannot go back: :meth:`check` raises. ``optimizer`` discards its state
    for a stored tensor that is not the weight.
    """

    def __init__(self, layer: nn.Module, optimizer: Optimizer | None = None) -> None:
        weight = layer_target(layer, "").parameter
        self._layer, self._optimizer = layer, optimizer
        self._untouched, self._order = weight.detach().clone(), list(layer._parameters)
        self._start = self._untouched
        self._gradient = weight.grad
        self._known = dict(optimizer.state.get(weight, {})) if optimizer is not None else {}

    def begin(self) -> None:
        """Record the stored tensor once the treatments are in place; it may change from now on."""
        self._gradient, self._known = None, {}
        if self._is_another():
            self._start = layer_target(self._layer, "").parameter.detach().clone()

    def check(self) -> None:
        """Raise, and change nothing, if the layer cannot go back."""
        if not (chain := parametrisations(self._layer)):
            return
        foreign = [one for one in chain if not isinstance(one, TreatmentClass)]
        if foreign and not self._is_another():  # such a layer does not use what they make of its weight
            raise RuntimeError(
                f"{getattr(chain[0], 'where', described(self._layer, ''))} got the parametrisation "
                f"{type(foreign[0]).__name__} since its weight was treated; first put the weight in use in its place "
                "by torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), then call remove()"
            )
        # Look it up again: load_state_dict(assign=True) and moves to another kind of device replace the tensor.
        weight = layer_target(self._layer, "").parameter
        if is_sharded(weight):
            raise RuntimeError(
                f"{described(self._layer, '')} was sharded since its weight was treated, and fully_shard cannot be "
                "undone; load the state into a model that is not sharded, and call remove() there"
            )
        if self._is_another() and not _same(weight, self._start):
            computed = chain[0]
            raise RuntimeError(
                f"{computed.treatment} of {computed.where} ({computed.extra_repr()}): no layer of its class is "
                "what it has learnt; keep it on, or take wellcond.nn.to_plain(model)"
            )

    def restore(self) -> None:
        """Remove them, once :meth:`check` has passed."""
        if not parametrisations(self._layer):
            return
        weight = layer_target(self._layer, "").parameter
        with torch.no_grad():
            if self._is_another():
                shape = weight.shape
                exchange(weight, self._untouched.to(weight))
                if self._optimizer is not None:
                    start_afresh(self._optimizer, weight, shape)
            elif not _same(weight, self._untouched):
                weight.copy_(self._layer.weight)  # pyright: ignore[reportArgumentType]
        bared(self._layer, "weight", weight, self._order)

    def undo(self) -> None:
        """Remove treatments that were applied in part: gradient and optimizer state are restored too."""
        if not parametrisations(self._layer):
            return
        changed = self._is_another()
        self.restore()
        if changed:
            weight = layer_target(self._layer, "").parameter
            weight.grad = self._gradient
            if self._optimizer is not None and self._known:
                self._optimizer.state[weight] = self._known

    def _is_another(self) -> bool:
        """Whether the stored tensor is that of another kind of layer, not the weight."""
        return any(getattr(one, "computes_layer", False) for one in parametrisations(self._layer))


def _same(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two weights are equal; always so on ``meta``, which has no values."""
    return weight.is_meta or torch.equal(weight, other.to(weight))


def bared(layer: nn.Module, name: str, weight: nn.Parameter, order: Sequence[str]) -> None:
    """Remove the parametrisations of one tensor, which becomes ``weight``, and restore the ``order`` of parameters."""
    if len(layer.parametrizations) == 1:  # pyright: ignore[reportArgumentType]
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.register_parameter(name, weight)
    else:
        parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    for one in (one for one in order if one in layer._parameters):
        layer._parameters[one] = layer._parameters.pop(one)
