"""Folding decorrelated batch norm into the layer before it: in evaluation it is one affine map of the channels.

y = γ ∘ S (x − μ) + β = M x + (β − M μ) with M = diag(γ) S, block diagonal by groups. After x = W u + b that is the same
kind of layer, with the weight M W and the bias M b + β − M μ, whatever its stride, padding and dilation.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ._base import replace_modules
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm

Model = TypeVar("Model", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# These do nothing in evaluation.
PASSED_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


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
        layer = before.get(norm)
        if layer is not None and (folded := _absorbed(layer, norm)) is not None:
            plain[layer], plain[norm] = folded.eval(), nn.Identity().eval()
        else:
            plain[norm] = _as_convolution(norm).eval()
    if model in plain:
        return plain[model]  # pyright: ignore[reportReturnType]
    replace_modules(model, plain)
    return model


@torch.no_grad()
def _absorbed(layer: nn.Module, norm: _DecorrelatedBatchNorm) -> nn.Module | None:
    """A new layer that is ``layer`` followed by the norm, or None where that is no layer of the same kind.

    Only torch's own classes are taken, without hooks: a subclass or a hook may do anything. A parametrised layer is
    read through its parametrisation; it is not changed, since its class is shared with the layer it was copied from.
    """
    kind: Any = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    if kind not in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    source: Any = layer
    weight, bias = source.weight.detach().double(), source.bias
    groups = 1 if kind is nn.Linear else source.groups
    channels = weight.shape[1] * groups if kind in TRANSPOSED else weight.shape[0]
    if channels != norm.num_features or (channels // groups) % (channels // norm.groups):
        return None
    matrix, shift = (tensor.to(weight.device) for tensor in norm.evaluation_map(torch.float64))
    M = matrix.reshape(norm.groups, -1, channels // norm.groups)

    def times(rows: Tensor) -> Tensor:
        """M times a tensor whose first dimension is the channels."""
        return (M @ rows.reshape(norm.groups, channels // norm.groups, -1)).reshape(rows.shape)

    if kind in TRANSPOSED:
        # (in, out/groups, *kernel): rows that are output channels come second, in each group of inputs.
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        mixed = times(rows).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    else:
        mixed = times(weight)
    if bias is not None:
        shift = shift + times(bias.detach().double())
    # The names of torch's own arguments are those of the attributes.
    form = [name for name in inspect.signature(kind).parameters if name not in ("bias", "device", "dtype")]
    where = {"device": source.weight.device, "dtype": source.weight.dtype}
    new: Any = kind(**{name: getattr(source, name) for name in form}, **where)
    new.weight.copy_(mixed)
    new.bias.copy_(shift)
    return new.requires_grad_(source.weight.requires_grad)


@torch.no_grad()
def _as_convolution(norm: _DecorrelatedBatchNorm) -> nn.Module:
    """The norm as a convolution of kernel 1."""
    weight, bias = norm.evaluation_map(torch.float64)
    kind: Any = (_PointwiseConv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
    like: Any = norm.running_mean if norm.weight is None else norm.weight
    C = norm.num_features
    layer = kind(C, C, 1, groups=norm.groups, device=like.device, dtype=like.dtype)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


class _PointwiseConv1d(nn.Conv1d):
    """A convolution of kernel 1 that also takes (N, C), as batch norm does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(-1)).squeeze(-1) if input.dim() == 2 else super().forward(input)


class _Tracer(fx.Tracer):
    """Looks into a module only if a decorrelated batch norm is inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        contains = type(m) is nn.Sequential or any(isinstance(x, _DecorrelatedBatchNorm) for x in m.modules())
        return isinstance(m, _DecorrelatedBatchNorm) or not contains


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
    read = {id(attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr"}
    found: dict[nn.Module, nn.Module] = {}
    for node, norm in calls.items():
        if not isinstance(norm, _DecorrelatedBatchNorm) or used.count(norm) != 1:
            continue
        source = node.all_input_nodes[0]
        while len(source.users) == 1 and type(calls.get(source)) in PASSED_THROUGH:
            source = source.all_input_nodes[0]
        layer = calls.get(source) if len(source.users) == 1 else None
        if layer is not None and used.count(layer) == 1 and not any(id(p) in read for p in layer.parameters()):
            found[norm] = layer
    return found
