"""Pre-spectral layers from the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.models import evaluating, run_example
from wellcond._shared.torch_internals import function_of, running_functions

from ._matrix import is_elementwise, matrix_names, stored_tensor
from ._walk_back import NAME_LAYERS, first_layers, raw_parameter

_ELEMENTWISE = ("AddBackward", "SubBackward", "MulBackward", "DivBackward", "CatBackward", "WhereBackward")
_CHECKPOINT = "CheckpointFunction"  # the name also outside of PyTorch (FairScale, DeepSpeed, Megatron)


def layers_by_running(model: nn.Module, spectral: list[nn.Module], example_input: Any) -> set[nn.Module]:
    """The first layers on every path back from the inputs of the spectral layers."""
    made_by: dict[Any, nn.Module] = {}
    inputs: list[Tensor] = []
    opaque: set[type] = set()  # the autograd functions that call layers with a weight, which the graph does not show
    inside: set[type] = set()  # those that call a spectral layer

    def note_function(*_: Any) -> None:
        opaque.update(running_functions())

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made_by[output.grad_fn] = module

    def note_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        inside.update(running_functions())
        inputs.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    weighted = [m for m in model.modules() if "weight" in matrix_names(m)]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))  # no updates of running statistics, no dropout
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if matrix_names(module):
                stack.callback(module.register_forward_hook(note_function).remove)
        for module in weighted:
            stack.callback(module.register_forward_hook(note_output).remove)
        for module in spectral:
            stack.callback(module.register_forward_pre_hook(note_input, with_kwargs=True).remove)
        run_example(model, _all_tracked(example_input), f", or {NAME_LAYERS}")
    for function in inside:
        raise _unknown_layers(function)
    if not inputs:
        raise ValueError(f"{type(model).__name__} called no spectral layer on the example input; {NAME_LAYERS}")
    gains = {id(p) for m in model.modules() if is_elementwise(m) for p in m.parameters(recurse=False)}
    raw = {id(p): name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in gains}
    owners = {id(stored_tensor(m)): m for m in weighted}

    def look(node: Any) -> tuple[list[nn.Module], list[Any]]:
        if node in made_by:
            return [made_by[node]], []
        function = function_of(node)
        if function is not None and (function in opaque or function.__name__ == _CHECKPOINT):
            raise _unknown_layers(function)
        before = [n for n, _ in node.next_functions if n is not None]
        if node.name().startswith(_ELEMENTWISE):
            return [], before
        used = [i for n in before for i in _leaf(n) if i in raw]
        for i in used:
            if i not in owners:
                raise raw_parameter(raw[i])
        return [owners[i] for i in used], before  # a weight used directly: F.linear(x, self.weight)

    return first_layers([x.grad_fn for x in inputs if x.grad_fn is not None], look)


def _unknown_layers(function: type) -> ValueError:
    """The error for layers that are called by an autograd function, which the graph shows as a single operation."""
    what = "a checkpoint (take use_reentrant=False)" if function.__name__ == _CHECKPOINT else function.__name__
    return ValueError(f"the layers inside {what} cannot be found from the autograd graph; {NAME_LAYERS}")


def _leaf(node: Any) -> Iterator[int]:
    """The parameter behind a node, if only operations with one argument (transpose, reshape, cast) lie between."""
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    if hasattr(node, "variable"):
        yield id(node.variable)


def _all_tracked(example_input: Any) -> Any:
    if isinstance(example_input, Mapping):
        return {name: _tracked(x) for name, x in example_input.items()}
    return tuple(map(_tracked, example_input if isinstance(example_input, tuple) else [example_input]))


def _tracked(x: Any) -> Any:
    """A floating tensor of the example, made to require a gradient so that frozen layers are found too."""
    return x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
