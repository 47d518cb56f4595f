"""The weight of a layer as a matrix W with one row per output channel: (out, in·kh·kw), as in section 4.1 of the paper.

A grouped convolution is block diagonal, so its weight is one matrix per group. A transposed convolution stores
(in, out/groups, ...) and is rearranged, so that rows are output channels there too. The same view reads every tensor
shaped like the weight (weight, gradient, update).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from wellcond._shared.models import described
from wellcond._shared.names import did_you_mean, listed


@dataclass(frozen=True)
class MatrixView:
    """How to read a weight tensor as ``groups`` matrices, and how to write them back."""

    groups: int = 1
    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """(groups, out/groups, columns) of a tensor shaped like the weight."""
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
    """A parameter to treat: its short name, its name in messages, its matrix view, and the layer that contains it.

    Raises ValueError for one that cannot be treated as a matrix.
    """

    name: str
    where: str
    parameter: nn.Parameter
    view: MatrixView = MatrixView()
    layer: nn.Module | None = None

    def __post_init__(self) -> None:
        if hasattr(self.parameter, "_fsdp_flattened") or hasattr(self.parameter, "ds_id"):
            raise ValueError(
                f"{self.where} has its weight flattened over processes (FullyShardedDataParallel, DeepSpeed ZeRO-3), "
                "where no matrix is left to treat; shard with torch.distributed.fsdp.fully_shard instead"
            )
        if self.parameter.ndim < 2 or (self.layer is not None and is_elementwise(self.layer)):
            matrices = listed(matrix_names(self.layer)) if self.layer is not None else ""
            raise ValueError(
                f"{self.where} has a weight of shape {tuple(self.parameter.shape)}, which is not a matrix; "
                f"at least two dimensions are needed{f' (matrices: {matrices})' if matrices else ''}"
            )
        if self.parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{self.where} has a weight of dtype {self.parameter.dtype}; a real floating dtype is needed"
            )


def parametrisations(layer: nn.Module, name: str = "weight") -> Any:
    """The parametrisations of the tensor ``name`` of the layer, first to last; empty without any."""
    lists: Any = layer.parametrizations if parametrize.is_parametrized(layer, name) else {name: ()}
    return lists[name]


def stored_tensor(layer: nn.Module, name: str = "weight") -> Tensor | None:
    """The tensor that the optimizer sees: the weight, or the one that a parametrisation computes it from.

    None if there is no such tensor, or if a parametrisation (weight norm) distributes it over several tensors.
    """
    if chain := parametrisations(layer, name):
        return chain.original if chain.is_tensor else None
    return layer._parameters.get(name)


def is_elementwise(layer: nn.Module) -> bool:
    """Whether the weight is a gain for each element, of any number of dimensions, as that of a ``LayerNorm``."""
    return hasattr(layer, "normalized_shape")


def matrix_names(layer: nn.Module) -> list[str]:
    """The names of the layer's tensors, parametrised or not, that can be read as matrices."""
    if is_elementwise(layer):
        return []
    names = [*layer._parameters, *getattr(layer, "parametrizations", ())]
    tensors = {name: stored_tensor(layer, name) for name in names}
    return [name for name, tensor in tensors.items() if tensor is not None and not is_lazy(tensor) and tensor.ndim > 1]


def layer_target(layer: nn.Module, label: str, name: str = "weight") -> Target:
    """The matrix-like tensor ``name`` of a layer, which messages call ``label``. Raises ValueError if there is none."""
    tensor = stored_tensor(layer, name)
    where = described(layer, label)
    if not isinstance(tensor, nn.Parameter):
        others = matrix_names(layer)
        raise ValueError(
            f"{where} has no parameter '{name}' that is one tensor{did_you_mean(name, others)} (matrices: "
            f"{listed(others) or 'none'}); choose a convolution, linear or embedding layer, pass the parameter itself, "
            "or remove a parametrisation such as weight norm first"
        )
    if is_lazy(tensor):
        raise ValueError(f"{where} is not initialised yet; run one forward pass before treating it")
    if getattr(layer, "sparse", False):
        raise ValueError(f"{where} has sparse gradients, which no matrix treatment can read; set sparse=False")
    if name != "weight":
        return Target(label, f"parameter '{name}' of {where}", tensor, layer=layer)
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return Target(
        label, where, tensor, MatrixView(layer.groups, layer.transposed) if convolution else MatrixView(), layer
    )


def weight_matrices(layer: nn.Module, name: str = "weight") -> Tensor:
    """The tensor ``name`` of a layer, as currently in use, as the matrices that the treatments act on.

    Args:
        layer: a layer with a tensor of that name with at least two dimensions, parametrised or not.
        name: the name of the tensor.

    Returns:
        (groups, m, n): one row per output channel, one matrix per group of a convolution; in the dtype of the tensor,
        differentiable.

    Raises:
        ValueError: the layer has no such tensor.

    Complexity: O(1), a view where the layout permits. Source: section 4.1 of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> weight_matrices(torch.nn.Conv2d(6, 9, 3, groups=3)).shape
        torch.Size([3, 3, 18])
    """
    return layer_target(layer, "", name).view.matrix(getattr(layer, name))


Treatable = nn.Module | nn.Parameter
Treatables = Treatable | Iterable[Treatable] | Mapping[str, Treatable]


def targets(what: Treatables) -> list[Target]:
    """The targets among layers and raw parameters (read as ``flatten(1)``), given singly, in a list, or by name."""
    if isinstance(what, (nn.Module, nn.Parameter)):
        what = [what]
    named: Any = what if isinstance(what, Mapping) else {str(i): item for i, item in enumerate(what)}
    found = []
    for name, item in named.items():
        if isinstance(item, nn.Module):
            found.append(layer_target(item, name))
        elif isinstance(item, nn.Parameter):
            found.append(Target(name, f"parameter '{name}'", item))
        else:
            raise TypeError(f"expected layers or parameters to treat, got {type(item).__name__} at '{name}'")
    if not found:
        raise ValueError("no layer or parameter to treat was given")
    return found
