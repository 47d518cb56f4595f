"""The weight of a layer as a matrix W with a row per output channel: (out, in·kh·kw), as in section 4.1 of the paper.

A grouped convolution is block diagonal, so its weight is one matrix per group; a transposed convolution stores
(in, out/groups, ...) and is turned round, so that rows are output channels there too. Every tensor of the weight's
shape (weight, gradient, update) is read by the same view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class MatrixView:
    """How a weight tensor is read as ``groups`` matrices, and written back."""

    groups: int = 1
    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """(groups, out/groups, columns) of a tensor shaped as the weight."""
        if not self.transposed:
            return tensor.reshape(self.groups, tensor.shape[0] // self.groups, -1)
        grouped = tensor.reshape(self.groups, tensor.shape[0] // self.groups, tensor.shape[1], -1)
        return grouped.transpose(1, 2).flatten(2)

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrix`, in the weight's ``shape``."""
        if not self.transposed:
            return matrix.reshape(shape)
        grouped = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, -1)
        return grouped.transpose(1, 2).reshape(shape)


@dataclass(frozen=True)
class Target:
    """A parameter to treat: its short name, what messages call it, the parameter, and how it is a matrix."""

    name: str
    where: str
    parameter: nn.Parameter
    view: MatrixView


def stored_weight(layer: nn.Module) -> Tensor | None:
    """The tensor that the optimizer sees: the weight, or what a parametrisation computes it from.

    None where there is no ``weight``, or a parametrisation (weight norm) spreads it over several tensors.
    """
    if parametrize.is_parametrized(layer, "weight"):
        chain: Any = layer.parametrizations
        return chain["weight"].original if chain["weight"].is_tensor else None
    return layer._parameters.get("weight")


def has_matrix_weight(layer: nn.Module) -> bool:
    """Whether the layer has a ``weight`` that is one initialised tensor of at least two dimensions."""
    weight = stored_weight(layer)
    return weight is not None and not is_lazy(weight) and weight.ndim > 1


def described(layer: nn.Module, name: str) -> str:
    """``layer 'conv1' (Conv2d)``, by the class that the user wrote where a parametrisation has made another."""
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    return f"layer '{name}' ({kind.__name__})"


def layer_target(layer: nn.Module, name: str) -> Target:
    """The matrix-like weight of a layer.

    Raises:
        ValueError: the layer has none, with its name and what to do.
    """
    weight = stored_weight(layer)
    where = described(layer, name)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{where} has no parameter 'weight' that is one tensor; choose a convolution, linear or embedding layer, "
            "pass the parameter itself, or remove a parametrisation such as weight norm first"
        )
    if is_lazy(weight):
        raise ValueError(f"{where} is not initialised yet; run one forward pass before treating it")
    if getattr(layer, "sparse", False):
        raise ValueError(f"{where} has sparse gradients, which no matrix treatment can read; set sparse=False")
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
    return _target(name, where, weight, MatrixView(groups, transposed))


def _target(name: str, where: str, parameter: nn.Parameter, view: MatrixView) -> Target:
    if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "ds_id"):
        raise ValueError(
            f"{where} has its weight flattened over processes (FullyShardedDataParallel, DeepSpeed ZeRO-3), where no "
            "matrix is left to treat; shard with torch.distributed.fsdp.fully_shard instead"
        )
    if parameter.ndim < 2:
        raise ValueError(
            f"{where} has a weight of shape {tuple(parameter.shape)}, which is not a matrix; "
            "a weight of at least two dimensions is needed"
        )
    if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where} has a weight of dtype {parameter.dtype}; a real floating dtype is needed")
    return Target(name, where, parameter, view)


Treatable = nn.Module | nn.Parameter


def targets(what: Treatable | Iterable[Treatable] | Mapping[str, Treatable]) -> list[Target]:
    """Layers and raw parameters (read as ``flatten(1)``), given singly, in a list, or by name."""
    if isinstance(what, (nn.Module, nn.Parameter)):
        what = [what]
    named: Any = what if isinstance(what, Mapping) else {str(i): item for i, item in enumerate(what)}
    found = []
    for name, item in named.items():
        if isinstance(item, nn.Module):
            found.append(layer_target(item, name))
        elif isinstance(item, nn.Parameter):
            found.append(_target(name, f"parameter '{name}'", item, MatrixView()))
        else:
            raise TypeError(f"expected layers or parameters to treat, got {type(item).__name__} at '{name}'")
    if not found:
        raise ValueError("no layer or parameter to treat was given")
    return found
