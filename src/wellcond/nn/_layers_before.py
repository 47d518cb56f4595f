"""Finding the layer whose output goes only into a norm: by symbolic tracing, or by one forward pass."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from operator import attrgetter
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from wellcond._shared.models import run_example

from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._hooks import has_forward_hooks, has_own_forward

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
# These do nothing in evaluation.
PASSED_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def layers_before(model: nn.Module, example_input: Any) -> dict[nn.Module, nn.Module]:
    """For each norm that can be folded, the module whose output goes only there."""
    return _by_tracing(model) if example_input is None else _by_running(model, example_input)


class _Tracer(fx.Tracer):
    """Traces a module only if it contains a decorrelated batch norm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        contains = type(m) is nn.Sequential or any(isinstance(x, _DecorrelatedBatchNorm) for x in m.modules())
        return isinstance(m, _DecorrelatedBatchNorm) or not contains


def _by_tracing(model: nn.Module) -> dict[nn.Module, nn.Module]:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's own code, which may raise anything
        warnings.warn(
            f"the forward function of {type(model).__name__} cannot be traced symbolically ({error}), so its "
            "decorrelated batch norms became 1 × 1 convolutions instead of being folded into the layers before them; "
            "give an example_input",
            stacklevel=4,
        )
        return {}
    calls = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    used: list[nn.Module] = [module for called in calls.values() for module in called.modules()]
    read = {id(attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr"}
    found: dict[nn.Module, nn.Module] = {}
    for node, norm in calls.items():
        if not isinstance(norm, _DecorrelatedBatchNorm) or used.count(norm) != 1:
            continue
        source = node.all_input_nodes[0]
        while len(source.users) == 1 and _does_nothing(calls.get(source)):
            source = source.all_input_nodes[0]
        layer = calls.get(source) if len(source.users) == 1 else None
        if layer is not None and not is_plain(layer) and (len(source.args) != 1 or source.kwargs):
            continue  # what it does with more than one input cannot be tried
        if layer is not None and used.count(layer) == 1 and not any(id(p) in read for p in layer.parameters()):
            found[norm] = layer
    return found


def _by_running(model: nn.Module, example_input: Any) -> dict[nn.Module, nn.Module]:
    """From one forward pass without gradients, observing every function that is called on a tensor.

    Raises:
        ValueError: the model does not run on the example.
    """
    seen = _Uses(model)
    with ExitStack() as stack, torch.no_grad():
        for module in seen.watched:
            stack.callback(module.register_forward_pre_hook(seen.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(seen.leave).remove)
        with seen:
            output = run_example(model, example_input)
    seen.use([*_held(output)])
    kept = _held([vars(module) for module in model.modules()], attributes=False)
    seen.use([x for x in kept if not isinstance(x, nn.Parameter)])
    return {norm: layer for norm, layer in seen.fed_by.items() if seen.feeds_only(layer, norm)}


class _Uses(TorchFunctionMode):
    """The uses of the outputs and parameters of layers while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        norms_and_layers = (_DecorrelatedBatchNorm, *LAYERS)
        self.watched = [m for m in model.modules() if _does_nothing(m) or isinstance(m, norms_and_layers)]
        self.fed_by: dict[nn.Module, nn.Module] = {}
        self._layer_of = {id(p): m for m in self.watched if isinstance(m, LAYERS) for p in m.parameters()}
        self._calls: Counter[nn.Module] = Counter()
        self._inside: list[nn.Module] = []
        self._used_elsewhere: set[nn.Module] = set()
        self._alive: list[Tensor] = []  # as ids are unique only among living tensors

    def feeds_only(self, layer: nn.Module, norm: nn.Module) -> bool:
        """Whether the output of ``layer`` goes into ``norm`` and nowhere else, and both were called once."""
        fed = list(self.fed_by.values())
        once = self._calls[layer] == self._calls[norm] == fed.count(layer) == 1
        return once and layer not in self._used_elsewhere

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[module] += 1
        (x,) = [*_tensors(args), *_tensors(kwargs)][:1] or [None]
        source = self._layer_of.get(id(x))
        if isinstance(module, _DecorrelatedBatchNorm) and source is not None:
            self.fed_by[module] = source
        elif isinstance(module, LAYERS):
            self.use(x)
            if not is_plain(module) and (len(args) != 1 or kwargs):  # what it does with more cannot be tried
                self._used_elsewhere.add(module)
        self._inside.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
        if not isinstance(output, Tensor):
            return
        if isinstance(module, PASSED_THROUGH) and (source := self._layer_of.get(id(next(_tensors(args), None)))):
            self._layer_of[id(output)] = source
        elif isinstance(module, LAYERS):
            self._layer_of[id(output)] = module
        self._alive.append(output)

    def use(self, values: Any, by: nn.Module | None = None) -> None:
        """Record a use other than by a norm, or by the layer itself."""
        layers = (layer for x in _tensors(values) if (layer := self._layer_of.get(id(x))))
        self._used_elsewhere.update(layer for layer in layers if layer is not by)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Queries, such as of the shape, do not count. What norms and torch's own layers do is recorded by their hooks.
        inside = self._inside[-1] if self._inside else None
        free = inside is None or (isinstance(inside, LAYERS) and not is_plain(inside))
        if free and not isinstance(result, (bool, int, torch.Size, torch.dtype, torch.device)):
            self.use((args, kwargs), by=inside)
        return result


def is_plain(module: nn.Module) -> bool:
    """Whether it is one of torch's layers and does what they do. A derived class, or a forward function of the
    instance's own, may do anything, also to other layers."""
    return type(module) in LAYERS and not has_own_forward(module)


def _does_nothing(module: nn.Module | None) -> bool:
    """Whether its output in evaluation is its input."""
    if module is None or type(module) not in PASSED_THROUGH:
        return False
    return not (has_own_forward(module) or has_forward_hooks(module))


def _held(value: Any, *, attributes: bool = True) -> Iterator[Tensor]:
    """The tensors in any collections and, with ``attributes``, in any objects, each once."""
    seen: dict[int, Any] = {}
    left = [value]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, ModuleType, FunctionType)):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, (tuple, list, set, frozenset, deque)):
            left.extend(value)
        if attributes:
            slots = [s for kind in type(value).__mro__ for s in vars(kind).values() if type(s) is MemberDescriptorType]
            left.extend(getattr(value, slot.__name__, None) for slot in slots)
            left.extend(getattr(value, "__dict__", {}).values())


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
