"""A copy of a model whose parametrised tensors are ordinary ones."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond._shared.models import unwrapped

Model = TypeVar("Model", bound=nn.Module)


def with_plain_weights(model: Model) -> Model:
    """A copy in evaluation mode whose parametrised tensors are ordinary ones, of the values in use.

    Not by ``torch.nn.utils.parametrize.remove_parametrizations``, which changes the class that copies share.
    """
    model = copy.deepcopy(unwrapped(model)).eval()  # pyright: ignore[reportAssignmentType]
    for layer in list(model.modules()):
        if not parametrize.is_parametrized(layer):
            continue
        lists: Any = layer.parametrizations
        plain: dict[str, Tensor] = {}
        for name, chain in lists.items():
            value, stored = getattr(layer, name).detach().clone(), list(chain.parameters(recurse=False))
            plain[name] = nn.Parameter(value, any(p.requires_grad for p in stored)) if stored else value
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        others = dict(layer._parameters)
        layer._parameters.clear()
        for name, value in plain.items():  # in front: a weight comes before its bias
            if isinstance(value, nn.Parameter):
                layer.register_parameter(name, value)
            else:
                layer.register_buffer(name, value)
        layer._parameters.update(others)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return model
