"""Pre-spectral layers from the autograd graph of one real forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._matrix import has_matrix_weight, stored_tensor
from ._remedies import NAME_LAYERS, raw_parameter

_ELEMENTWISE = ("AddBackward", "SubBackward", "MulBackward", "DivBackward", "CatBackward", "WhereBackward")


def layers_by_running(model: nn.Module, spectral: list[nn.Module], example_input: Any) -> set[nn.Module]:
    """The layers met first on every path back from the inputs that the spectral layers got."""
    made_by: dict[Any, nn.Module] = {}
    inputs: list[Tensor] = []

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made_by[output.grad_fn] = module

    def note_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    weighted = [m for m in model.modules() if has_matrix_weight(m)]
    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        stack.enter_context(torch.enable_grad())
        for module in weighted:
            stack.callback(module.register_forward_hook(note_output).remove)
        for module in spectral:
            stack.callback(module.register_forward_pre_hook(note_input, with_kwargs=True).remove)
        args, kwargs = _arguments(example_input)
        try:
            model(*args, **kwargs)
        except Exception as error:  # the model's own code may raise anything
            raise ValueError(
                f"{type(model).__name__} could not be run on the example input ({type(error).__name__}: {error}); "
                f"give one that it accepts, or {NAME_LAYERS}"
            ) from error
    if not inputs:
        raise ValueError(f"{type(model).__name__} called no spectral layer on the example input; {NAME_LAYERS}")
    owners: dict[int, tuple[str, nn.Module | None]] = {}
    owners.update((id(p), (name, None)) for name, p in model.named_parameters() if p.ndim > 1)
    owners.update((id(stored_tensor(m)), ("", m)) for m in weighted)
    return _nearest(inputs, made_by, owners)


def _nearest(
    inputs: list[Tensor], made_by: dict[Any, nn.Module], owners: dict[int, tuple[str, nn.Module | None]]
) -> set[nn.Module]:
    found: set[nn.Module] = set()
    seen: set[Any] = set()
    front = [x.grad_fn for x in inputs if x.grad_fn is not None]
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found.add(made_by[node])
            continue
        before = [n for n, _ in node.next_functions if n is not None]
        used: list[nn.Module] = []
        if not node.name().startswith(_ELEMENTWISE):
            for name, owner in (owners[i] for n in before for i in _leaf(n) if i in owners):
                if owner is None:
                    raise raw_parameter(name)
                used.append(owner)
        found.update(used)  # a weight used as a function: F.linear(x, self.weight)
        front += [] if used else before
    return found


def _leaf(node: Any) -> Iterator[int]:
    """The parameter behind a node, if only operations of one argument (transpose, reshape, cast) lie between."""
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    if hasattr(node, "variable"):
        yield id(node.variable)


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; floating tensors require a gradient, so that frozen layers are seen too."""
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}

    def tracked(x: Any) -> Any:
        return x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(tracked(x) for x in args), {key: tracked(x) for key, x in kwargs.items()}


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no statistic moves, no dropout), every module's own mode restored after."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
