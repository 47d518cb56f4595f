"""Shared by the two searches for the layers before a spectral layer: the walk back, and the advice in messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

NAME_LAYERS = "name the layers to treat with layers=..."
GIVE_EXAMPLE = f"give an example_input, or {NAME_LAYERS}"


def raw_parameter(name: str) -> ValueError:
    """The error for a parameter that is used as a matrix but is not the weight of a layer."""
    return ValueError(
        f"parameter '{name}' before the spectral layer is not the weight of a layer; pass it to "
        f"NearestOrthogonalGradient or OptimalLearningRate itself, or {NAME_LAYERS}"
    )


def first_layers(
    starts: Iterable[Any], look: Callable[[Any], tuple[Iterable[nn.Module], Iterable[Any]]]
) -> set[nn.Module]:
    """The first layers on every path back from ``starts``.

    ``look`` returns the layers whose weights a node of the graph uses, and the nodes before it.
    """
    found: set[nn.Module] = set()
    seen: set[Any] = set()
    front = list(starts)
    while front:
        node = front.pop()
        if node not in seen:
            seen.add(node)
            layers, before = look(node)
            found.update(layers)
            front += [] if layers else before
    return found
