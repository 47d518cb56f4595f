"""A copy of a model whose parametrised tensors are ordinary ones."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond._shared.models import unwrapped, without_compile

from ._base import replace_modules
from ._hooks import carried_hooks, carry_hooks
from .skew_orthogonal_conv import SkewOrthogonalConv2d

Model = TypeVar("Model", bound=nn.Module)


def with_plain_weights(model: Model) -> Model:
    """A copy in evaluation mode whose parametrised tensors are ordinary ones, with the values in use, and without
    ``torch.compile`` in any part.

    A convolution that computes as a skew-orthogonal one becomes a :class:`SkewOrthogonalConv2d`.

    ``torch.nn.utils.parametrize.remove_parametrizations`` would change the class, which copies share.
    """
    model = _uncompiled_copy(unwrapped(model)).eval()  # pyright: ignore[reportAssignmentType]
    skew = {layer: conv for layer in model.modules() if (conv := _as_skew_orthogonal(layer)) is not None}
    if model in skew:
        return skew[model]  # pyright: ignore[reportReturnType]
    replace_modules(model, skew)
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


def _uncompiled_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that is not compiled as a whole, without ``torch.compile`` in its parts."""
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)
    inner: dict[nn.Module, nn.Module] = {}
    for name, part in model.named_modules():
        if without_compile(part) is not part:
            wrapper = twin.get_submodule(name)
            # A copy of a compiled module has lost the hooks of the wrapper.
            vars(wrapper).update(copy.deepcopy(carried_hooks(part), memo))
            inner[without_compile(wrapper)] = without_compile(wrapper)
    replace_modules(twin, inner)
    return twin


def _as_skew_orthogonal(layer: nn.Module) -> SkewOrthogonalConv2d | None:
    """The layer as a skew-orthogonal one, if a parametrisation of its weight has the attribute ``skew_orthogonal``."""
    lists: Any = layer.parametrizations if parametrize.is_parametrized(layer, "weight") else {"weight": ()}
    chain = lists["weight"]
    options = next((one.skew_orthogonal for one in chain if hasattr(one, "skew_orthogonal")), None)
    if options is None:
        return None
    stored, bias = chain.original, layer.bias
    conv = SkewOrthogonalConv2d(**options, bias=bias is not None, device=stored.device, dtype=stored.dtype).eval()
    conv.weight = nn.Parameter(stored.detach().clone(), stored.requires_grad)
    carry_hooks(layer, conv)
    if isinstance(bias, nn.Parameter):
        conv.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return conv
