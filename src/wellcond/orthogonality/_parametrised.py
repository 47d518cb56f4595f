"""Putting a parametrisation on a layer's weight and taking it off, so that the optimizer never notices.

The stored tensor is the weight's own ``Parameter`` with its values, so the optimizer, its state, DDP and averaged
copies keep hold of the right one. Removal does not go through ``torch.nn.utils.parametrize.remove_parametrizations``,
which takes the attribute away from every deep copy of the layer too (they share one generated class).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond._shared.models import described

from ._matrix import MatrixView, Target, layer_target
from ._sharded import is_sharded, spread, whole


class WeightParametrisation(nn.Module):
    """Base of the parametrisations of this package: a map from the stored weight to the one in use."""

    treatment = "weight parametrisation"

    def __init__(self, view: MatrixView) -> None:
        super().__init__()
        self.view = view

    def __call__(self, stored: Tensor) -> Tensor:
        """The weight in use; outside of the layer's forward pass ``fully_shard`` leaves only a shard of ``stored``."""
        return spread(super().__call__(whole(stored)), stored)

    def extra_repr(self) -> str:
        return f"groups={self.view.groups}" if self.view.groups > 1 else ""


def chain(layer: nn.Module) -> list[nn.Module]:
    """The parametrisations on the layer's weight, first to last."""
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    lists: Any = layer.parametrizations
    return list(lists["weight"])


def require_free(layer: nn.Module, name: str, kind: type[WeightParametrisation]) -> Target:
    """The layer's weight, if a parametrisation of this kind may still be put on it."""
    for there in chain(layer):
        if isinstance(there, kind):
            raise ValueError(f"{kind.treatment} of {described(layer, name)} is already on; remove it first")
        if not isinstance(there, WeightParametrisation):
            raise ValueError(
                f"{kind.treatment} of {described(layer, name)}: its weight already has the parametrisation "
                f"{type(there).__name__}; remove that first"
            )
    target = layer_target(layer, name)
    if is_sharded(target.parameter):
        raise ValueError(
            f"{kind.treatment} of {target.where}: its weight is sharded over processes already; call "
            f"{kind.treatment.replace(' ', '_')}(layer) before fully_shard, and make the optimizer after both"
        )
    return target


def attach(layer: nn.Module, parametrisation: WeightParametrisation) -> None:
    """Put it on top of what is on the layer's weight."""
    bare = not chain(layer)
    weight = layer_target(layer, "").parameter
    if bare:  # registered with a stand-in: PyTorch would call weight.set_, which cuts it off from DDP's hooks
        layer._parameters["weight"] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    try:
        parametrize.register_parametrization(layer, "weight", parametrisation)
    except Exception:
        if bare:
            layer._parameters["weight"] = weight
        raise
    lists: Any = layer.parametrizations
    lists["weight"].original = weight
    # PyTorch refuses to pickle a parametrised module, because its class is made at run time; ours can be made again.
    type(layer).__reduce__ = _reduce  # pyright: ignore[reportAttributeAccessIssue]


def _reduce(layer: nn.Module) -> tuple[Any, ...]:
    lists: Any = layer.parametrizations
    if len(lists) > 1:
        raise RuntimeError(
            f"{type(layer).__name__} has parametrisations besides that of its weight; save its state_dict"
        )
    return _rebuild, (type(layer).__bases__[0], dict(layer.__dict__))


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """The parametrised layer again, from its bare class and its attributes."""
    layer = base.__new__(base)
    modules = dict(state["_modules"])
    parametrisations = modules.pop("parametrizations")["weight"]
    parameters = {**state["_parameters"], "weight": parametrisations.original}
    layer.__dict__.update(state, _modules=modules, _parameters=parameters)
    for parametrisation in parametrisations:
        buffers = dict(parametrisation._buffers)  # registering would start them afresh from the stored weight
        attach(layer, parametrisation)
        parametrisation._buffers.update(buffers)
    return layer


def restorer(layer: nn.Module) -> Callable[[], None]:
    """A function that takes all parametrisations off the weight of ``layer``, which has none now.

    The layer keeps the weight in use; but if the stored tensor is what it is now (no step has been taken), it gets
    that one back bit for bit. The parameters keep their order.
    """
    untouched = layer_target(layer, "").parameter.detach().clone()
    order = list(layer._parameters)

    def restore() -> None:
        if not chain(layer):
            return
        # Read again: loading with assign=True or a move to another kind of device makes it a new tensor.
        weight = layer_target(layer, "").parameter
        if is_sharded(weight):
            raise RuntimeError(
                f"{described(layer, '')} was sharded since its weight was treated, and fully_shard cannot be undone; "
                "load the state into a model that is not sharded, and call remove() there"
            )
        with torch.no_grad():
            if not torch.equal(weight, untouched.to(weight)):
                weight.copy_(layer.weight)  # pyright: ignore[reportArgumentType]
        lists: Any = layer.parametrizations
        if len(lists) == 1:
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            layer.register_parameter("weight", weight)
        else:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for name in order:
            layer._parameters[name] = layer._parameters.pop(name)

    return restore
