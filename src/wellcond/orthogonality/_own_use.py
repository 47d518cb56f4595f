"""Weights that a model's forward function uses directly, as in ``F.conv2d(x, self.conv.weight)``.

A treatment that computes the layer's output, and not just its weight, would be bypassed there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from wellcond._shared.models import bare_name, unwrapped

from ._symbolic_walk import ELEMENTWISE, graphs_of


def require_called(model: nn.Module, layers: Mapping[str, nn.Module], treatment: str) -> None:
    """Raise for ``layers`` whose weight meets the data outside of the layer; undetected if the model cannot be traced.

    Elementwise sums do not count: this is how a function of the weight enters a loss.
    """
    inner = unwrapped(model)
    modules = {bare_name(name): module for name, module in inner.named_modules()}
    try:
        graphs = graphs_of(inner)
    except ValueError:
        return
    for graph in graphs:
        with_data: set[fx.Node] = set()
        of_weight: dict[fx.Node, set[str]] = {}  # the paths of the modules whose weight it is computed from
        for node in graph.nodes:  # in the order of computation
            paths = {path for i in node.all_input_nodes for path in of_weight.get(i, ())}
            if node.op != "placeholder" and with_data.isdisjoint(node.all_input_nodes):
                path, _, tensor = str(node.target).rpartition(".")
                of_weight[node] = paths | ({bare_name(path)} if node.op == "get_attr" and tensor == "weight" else set())
                continue
            with_data.add(node)
            used = [name for name, layer in layers.items() if any(modules.get(path) is layer for path in paths)]
            if used and getattr(node.target, "__name__", node.target) not in ELEMENTWISE:
                raise ValueError(
                    f"{treatment} computes the output of layer '{used[0]}', but the forward function of "
                    f"{type(inner).__name__} takes its weight instead of calling it; call the layer, or choose "
                    "another map"
                )
