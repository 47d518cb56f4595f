"""Pre-spectral layers from the symbolic graph of a model's forward function (torch.fx), without running it."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from wellcond._shared.models import is_spectral, unwrapped

from ._matrix import is_elementwise, matrix_names
from ._sharded import is_fully_sharded
from ._walk_back import GIVE_EXAMPLE, first_layers, raw_parameter

_MOST_TRACES = 64
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
ELEMENTWISE = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "cat", "concat", "where"}


class _Tracer(fx.Tracer):
    """A tracer that stops at layers with a weight, spectral layers, torch's own modules and the given ``leaves``.

    It answers ``bool(proxy)`` from a script, with False beyond its end, and records the answers in ``decisions``.
    """

    def __init__(self, script: list[bool], leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._leaves = frozenset(leaves)
        self._answers = iter(script)
        self.decisions: list[bool] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_spectral(m)
            or m in self._leaves
            or parametrize.is_parametrized(m)
            or "weight" in matrix_names(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (inner := unwrapped(m)) is not m:  # a compiled part cannot be traced itself
            return inner(*args, **kwargs)
        # The forward hooks of a sharded module gather weights, which fails on the tracer's proxies.
        return super().call_module(m, m.forward if is_fully_sharded(m) else forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.decisions.append(next(self._answers, False))
        return self.decisions[-1]


def layers_by_tracing(model: nn.Module, of: nn.Module | None = None) -> set[nn.Module]:
    """The pre-spectral layers, which must agree on every path through the forward function that does not raise.

    They are those before all spectral layers, or before the layer ``of``, whatever its kind.
    """
    return _before(model, graphs_of(model, () if of is None else (of,)), of)


def layers_before_each(model: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, set[nn.Module]]:
    """What :func:`layers_by_tracing` gives for each of these layers, if it does.

    The model is traced once for all layers into which no trace goes anyway, once for those without parts, and once for
    each of the others, in which the search for another layer may end.
    """
    as_is = _Tracer([], ())
    leaves = [layer for layer in layers if as_is.is_leaf_module(layer, "")]
    simple = [layer for layer in layers if layer not in leaves and not any(True for _ in layer.children())]
    found: dict[nn.Module, set[nn.Module]] = {}
    groups = [leaves, simple, *([layer] for layer in layers if layer not in leaves and layer not in simple)]
    for group in filter(None, groups):
        try:
            graphs = graphs_of(model, () if group is leaves else group)
        except ValueError:
            if group is simple and len(simple) > 1:  # one of them may spoil it for the others
                groups += [[layer] for layer in simple]
            continue
        for layer in group:
            with suppress(ValueError):
                found[layer] = _before(model, graphs, layer)
    return found


def _before(model: nn.Module, graphs: list[fx.Graph], of: nn.Module | None) -> set[nn.Module]:
    answers = [_nearest(model, graph, of) for graph in graphs]
    if any(answer != answers[0] for answer in answers):
        raise ValueError(
            f"which layer comes before the spectral layer of {type(model).__name__} depends on its data; {GIVE_EXAMPLE}"
        )
    return answers[0]


def graphs_of(model: nn.Module, leaves: Collection[nn.Module] = ()) -> list[fx.Graph]:
    """One graph for every branch of the forward function's control flow on data; ``leaves`` are not traced into."""
    graphs: list[fx.Graph] = []
    scripts: list[list[bool]] = [[]]
    refusal: Exception | None = None
    for _ in range(_MOST_TRACES):
        if not scripts:
            break
        script = scripts.pop()
        tracer = _Tracer(script, leaves)
        try:
            with _left_as_it_was(model):
                graphs.append(tracer.trace(model))
        except Exception as error:  # the model's code may raise anything
            if _from_tracing(error):
                raise _untraceable(model, error) from error
            refusal = refusal or error  # an input check that this branch did not pass
        taken = tracer.decisions
        scripts += [[*taken[:i], True] for i in range(len(script), len(taken))]
    if scripts:
        raise _untraceable(model, f"more than {_MOST_TRACES} paths through its control flow")
    if not graphs:
        raise _untraceable(model, refusal) from refusal
    return graphs


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo changes that the model's code makes to itself while traced, such as storing a proxy or counting calls. Its
    hooks are not called at all."""
    kept = []
    for module in model.modules():
        attributes = dict(vars(module))
        containers = {k: copy(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}
        buffers = {k: v.clone() for k, v in module._buffers.items() if v is not None}
        kept.append((module, attributes, containers, buffers))
        vars(module).update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        for module, attributes, containers, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, contents in containers.items():
                held = attributes[name]
                if isinstance(held, list):
                    held[:] = contents
                else:
                    held.clear()
                    held.update(contents)
            for name, value in buffers.items():
                buffer = module._buffers[name]
                if buffer is not None and not torch.equal(buffer, value):
                    buffer.data.copy_(value)


def _from_tracing(error: Exception) -> bool:
    """Whether tracing itself failed: in torch.fx, or where the model needs a number from a proxy."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    inside = frame.f_globals.get("__name__", "").startswith("torch.fx")
    return inside or (isinstance(error, TypeError) and "'Proxy'" in str(error))


def _untraceable(model: nn.Module, why: Any) -> ValueError:
    return ValueError(
        f"the forward function of {type(model).__name__} cannot be traced symbolically ({why}); {GIVE_EXAMPLE}"
    )


def _nearest(model: nn.Module, graph: fx.Graph, of: nn.Module | None) -> set[nn.Module]:
    """The first layers on every path back from the inputs of the spectral layers."""
    calls = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    from_input: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(i in from_input for i in node.all_input_nodes):
            from_input.add(node)
    spectral = [node for node, m in calls.items() if (is_spectral(m) if of is None else m is of)]
    if not spectral:
        raise _untraceable(model, "the graph calls no spectral layer")

    def look(node: fx.Node) -> tuple[list[nn.Module], list[fx.Node]]:
        before = [i for i in node.all_input_nodes if i in from_input]
        module = calls.get(node)
        if module is not None and "weight" in matrix_names(module):
            return [module], []
        if module is not None and node not in spectral and any(map(matrix_names, module.modules())):
            raise ValueError(
                f"layer '{node.target}' ({type(module).__name__}) before the spectral layer has several weights, and "
                f"tracing does not see which of them is used last; {GIVE_EXAMPLE}"
            )
        # a function is known by its name, a method by the node's target
        if module is not None or getattr(node.target, "__name__", node.target) in ELEMENTWISE:
            return [], before
        # a weight used directly: F.conv2d(x, self.weight)
        return [o for i in node.all_input_nodes if i not in from_input for o in _weights_in(model, i)], before

    return first_layers((i for node in spectral for i in node.all_input_nodes if i in from_input), look)


def _weights_in(model: nn.Module, node: fx.Node) -> Iterator[nn.Module]:
    """The owners of the matrix-like weights that a node, independent of the input, is computed from."""
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        owner = model.get_submodule(path)
        tensor = getattr(owner, name)
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and not is_elementwise(owner):
            if name != "weight":
                raise raw_parameter(str(node.target))
            yield owner
    for i in node.all_input_nodes:
        yield from _weights_in(model, i)
