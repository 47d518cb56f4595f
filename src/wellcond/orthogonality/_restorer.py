"""How a layer gets its weight back when the treatments of the weight are taken off.

Not through ``torch.nn.utils.parametrize.remove_parametrizations``, which takes the attribute away from every deep copy
of the layer too (they share one generated class).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from wellcond._shared.models import described

from ._exchange import exchange
from ._matrix import layer_target, parametrisations
from ._sharded import is_sharded


def restorer(layer: nn.Module, optimizer: Optimizer | None = None) -> Callable[[], None]:
    """A function that takes all parametrisations off the weight of ``layer``, which has none now.

    The layer keeps the weight in use, or, if no step has moved the stored tensor, has its own back bit for bit. One
    that is no longer a layer of its class stays so, and the function refuses. ``optimizer`` forgets what it knows of a
    stored tensor that was another one.
    """
    untouched = layer_target(layer, "").parameter.detach().clone()
    order = list(layer._parameters)

    def restore() -> None:
        if not parametrisations(layer):
            return
        # Read again: loading with assign=True or a move to another kind of device makes it a new tensor.
        weight = layer_target(layer, "").parameter
        if is_sharded(weight):
            raise RuntimeError(
                f"{described(layer, '')} was sharded since its weight was treated, and fully_shard cannot be undone; "
                "load the state into a model that is not sharded, and call remove() there"
            )
        with torch.no_grad():
            if (computed := parametrisations(layer)[0]).computes_layer:
                if not torch.equal(weight, computed.right_inverse(untouched.to(weight))):
                    raise RuntimeError(
                        f"{computed.treatment} of {computed.where} ({computed.extra_repr()}): no layer of its class is "
                        "what it has learnt; keep it on, or take wellcond.nn.to_plain(model)"
                    )
                exchange(weight, untouched.to(weight))
                if optimizer is not None:
                    optimizer.state.pop(weight, None)
            elif not torch.equal(weight, untouched.to(weight)):
                weight.copy_(layer.weight)  # pyright: ignore[reportArgumentType]
        if len(layer.parametrizations) == 1:  # pyright: ignore[reportArgumentType]
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            layer.register_parameter("weight", weight)
        else:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for name in (name for name in order if name in layer._parameters):
            layer._parameters[name] = layer._parameters.pop(name)

    return restore
