"""Folding decorrelated batch norm into the layer before it: in evaluation it is one affine map of the channels.

y = γ ∘ S (x − μ) + β = M x + (β − M μ) with M = diag(γ) S, block diagonal by groups. After x = W u + b that is the same
kind of layer, with the weight M W and the bias M b + β − M μ, whatever its stride, padding and dilation.
"""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from ._affine import ChannelAffine, absorbed, channel_convolution
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm

Model = TypeVar("Model", bound=nn.Module)
_PASSES_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""What does nothing in evaluation."""


def fold(model: Model) -> Model:
    """A copy of ``model`` in evaluation mode, without decorrelated batch norm: same outputs, less work.

    Each one is folded into the convolution, transposed convolution or linear layer before it, where the output of that
    layer goes nowhere else and, if it is grouped, no group of the norm mixes two groups of it. Elsewhere a 1 × 1
    convolution takes its place. Parametrised weights (an orthogonal weight, a spectral norm) become plain ones there.
    A linear layer is taken to give (N, C). Ordinary ``nn.BatchNorm`` stays as it is, and so does a decorrelated one
    without running statistics, which has no fixed map.

    Args:
        model: any module; it is not changed, and may be in training mode: running statistics are what is used.

    Returns:
        The copy, whose outputs differ from those of ``model.eval()`` by rounding.

    The layers are found by symbolic tracing (``torch.fx``), where only what contains a decorrelated batch norm has to
    be traceable; if it is not, a warning says so, and every norm becomes a 1 × 1 convolution.

    Example:
        >>> import torch
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> fold(nn.Sequential(nn.Conv2d(3, 8, 3), DecorrelatedBatchNorm2d(8), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    model = copy.deepcopy(model).eval()
    norms = [m for m in model.modules() if isinstance(m, _DecorrelatedBatchNorm) and m.track_running_stats]
    if not norms:
        return model
    before = {} if model in norms else _layers_before(model)
    plain: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        affine = _affine_map(norm)
        layer = before.get(norm)
        folded = None if layer is None else absorbed(layer, affine)
        if layer is None or folded is None:
            plain[norm] = channel_convolution(affine, dims=max(norm._dims) - 2)
        else:
            plain[layer], plain[norm] = folded, nn.Identity()
    for module in plain.values():
        module.eval()
    if model in plain:
        return plain[model]  # pyright: ignore[reportReturnType]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, plain[module])
    return model


@torch.no_grad()
def _affine_map(norm: _DecorrelatedBatchNorm) -> ChannelAffine:
    """M (groups, d, d) and the shift (C,), in float64."""
    weight, bias = norm.evaluation_map(torch.float64)
    dtype = bias.dtype if norm.weight is None else norm.weight.dtype
    return ChannelAffine(weight.reshape(norm.groups, -1, weight.shape[1]), bias, dtype)


class _Tracer(fx.Tracer):
    """Looks into a module only if a decorrelated batch norm is inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _DecorrelatedBatchNorm):
            return True
        return type(m) is not nn.Sequential and not any(isinstance(x, _DecorrelatedBatchNorm) for x in m.modules())


def _layers_before(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each norm that may be folded, the module whose output goes there and nowhere else."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's own code, which may raise anything
        warnings.warn(
            f"the forward function of {type(model).__name__} cannot be traced symbolically ({error}), so its "
            "decorrelated batch norms became 1 × 1 convolutions instead of being folded into the layers before them",
            stacklevel=3,
        )
        return {}
    calls = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    used: list[nn.Module] = [module for called in calls.values() for module in called.modules()]
    read = {id(_tensor_at(model, str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    found: dict[nn.Module, nn.Module] = {}
    for node, norm in calls.items():
        if not isinstance(norm, _DecorrelatedBatchNorm) or used.count(norm) != 1:
            continue
        source = node.all_input_nodes[0]
        while len(source.users) == 1 and type(calls.get(source)) in _PASSES_ON:
            source = source.all_input_nodes[0]
        layer = calls.get(source) if len(source.users) == 1 else None
        if (
            layer is not None
            and used.count(layer) == 1
            and not any(id(tensor) in read for tensor in layer.parameters())
        ):
            found[norm] = layer
    return found


def _tensor_at(model: nn.Module, target: str) -> Tensor | None:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name, None)
