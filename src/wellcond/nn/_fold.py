"""Folding decorrelated batch norm into the layer before it: in evaluation it is one affine map of the channels.

y = γ ∘ S (x − μ) + β = M x + (β − M μ) with M = diag(γ) S, block diagonal by groups. After x = W u + b that is the same
kind of layer, with the weight M W and the bias M b + β − M μ, whatever its stride, padding and dilation. Or S alone
goes into the layer, S W and S b, and γ ∘ (x − S μ) + β is a plain batch norm: then the model has the layers and the
state dict that it had before its batch norm was replaced.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond._shared.models import unwrapped

from ._base import replace_modules
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._layers_before import LAYERS, TRANSPOSED, layers_before

Model = TypeVar("Model", bound=nn.Module)
BATCHNORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def fold(model: Model, example_input: Any = None) -> Model:
    """A copy of ``model`` in evaluation mode, without decorrelated batch norm: same outputs, less work.

    Each one is folded into the convolution, transposed convolution or linear layer before it, where the output of that
    layer goes nowhere else and, if it is grouped, no group of the norm mixes two groups of it. Elsewhere a 1 × 1
    convolution takes its place. Every parametrised weight (an orthogonal weight, a spectral norm) becomes a plain one.
    A linear layer is taken to give (N, C). Ordinary ``nn.BatchNorm`` stays as it is, and so does a decorrelated one
    without running statistics, which has no fixed map. :func:`to_plain` keeps the layers and names instead.

    Args:
        model: any module; it is not changed, and may be in training mode: running statistics are what is used.
        example_input: what the model is called with, for one that cannot be traced: a tensor, a tuple of arguments, or
            a dict of keyword arguments. What the model does with it is taken to be what it does with any input.

    Returns:
        The copy, whose outputs differ from those of ``model.eval()`` by rounding.

    Raises:
        ValueError: the model does not run on the example input.

    Without an example the layers are found by symbolic tracing (``torch.fx``), where only what contains a decorrelated
    batch norm has to be traceable; if it is not, a warning says so, and every norm becomes a 1 × 1 convolution.

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
    model = _with_plain_weights(model)
    norms = _norms(model)
    before = _before(model, norms, example_input)
    plain: dict[nn.Module, nn.Module] = {}
    for norm in norms.values():
        layer = before.get(norm)
        if layer is not None and (folded := _absorbed(layer, norm)) is not None:
            plain[layer], plain[norm] = folded, nn.Identity()
        else:
            plain[norm] = _as_convolution(norm)
    return _replaced(model, plain)


def to_plain(model: Model, example_input: Any = None) -> Model:
    """A copy of ``model`` in evaluation mode, of plain ``torch.nn`` layers: treatments off, whitening folded in.

    Its state dict is that of the model without treatments and with ordinary batch norm, so that whatever builds that
    one loads it: ``from_pretrained``, ``load_from_checkpoint``, ``load_state_dict``. Every parametrised weight becomes
    a plain one, the one in use. Of a decorrelated batch norm the whitening matrix goes into the layer before it, under
    the conditions of :func:`fold`, and the rest is an ``nn.BatchNorm`` with the scale and shift and a running variance
    of 1 (less ε). Where there is no such layer, a 1 × 1 convolution takes its place and a warning names it: that copy
    has another state dict.

    What no layer of ``torch.nn`` can do stays as it is: :class:`GlobalCovariancePool2d`, :class:`TokenCovariancePool`,
    :class:`SpectralLayer`, :class:`WhiteningColoring` (which save nothing that is theirs) and
    :class:`SkewOrthogonalConv2d` (whose parameters are ordinary ones).

    Args:
        model: any module; it is not changed. Of a wrapped one (DDP, ``torch.compile``) the model inside is copied.
        example_input: as for :func:`fold`.

    Returns:
        The copy, whose outputs differ from those of ``model.eval()`` by rounding.

    Raises:
        ValueError: a decorrelated batch norm without running statistics, which has no fixed map (naming it); the model
            does not run on the example input.

    Example:
        >>> import torch
        >>> from wellcond.nn import replace_batchnorm
        >>> from wellcond.orthogonality import orthogonal_weight
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> names = list(model.state_dict())
        >>> _ = replace_batchnorm(model), orthogonal_weight(model[0])
        >>> list(to_plain(model).state_dict()) == names
        True
    """
    model = _with_plain_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, _DecorrelatedBatchNorm) and not module.track_running_stats:
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) keeps no running statistics: its output depends on the "
                "batch, and no plain layer has it; train it with track_running_stats=True"
            )
    norms = _norms(model)
    before = _before(model, norms, example_input)
    plain: dict[nn.Module, nn.Module] = {}
    alone = []
    for name, norm in norms.items():
        layer = before.get(norm)
        if layer is not None and (whitened := _absorbed(layer, norm, whitening_only=True)) is not None:
            plain[layer], plain[norm] = whitened, _as_batchnorm(norm)
        else:
            plain[norm] = _as_convolution(norm)
            alone.append(f"'{name}'")
    if alone:
        warnings.warn(
            f"{', '.join(alone)}: no layer before that the whitening folds into, so it became a 1 × 1 convolution, "
            "which the model with ordinary batch norm does not have; load the state into a copy made by to_plain",
            stacklevel=2,
        )
    return _replaced(model, plain)


def _norms(model: nn.Module) -> dict[str, _DecorrelatedBatchNorm]:
    """Those that are a fixed map in evaluation, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, _DecorrelatedBatchNorm)}
    return {name: norm for name, norm in found.items() if norm.track_running_stats}


def _before(
    model: nn.Module, norms: dict[str, _DecorrelatedBatchNorm], example_input: Any
) -> dict[nn.Module, nn.Module]:
    return layers_before(model, example_input) if norms and model not in norms.values() else {}


def _replaced(model: Any, new: dict[nn.Module, nn.Module]) -> Any:
    for module in new.values():
        module.eval()
    if model in new:
        return new[model]
    replace_modules(model, new)
    return model


def _with_plain_weights(model: Model) -> Model:
    """A copy in evaluation mode whose parametrised tensors are ordinary ones, of the values in use.

    Not by ``torch.nn.utils.parametrize.remove_parametrizations``, which changes the class that copies share.
    """
    model = copy.deepcopy(unwrapped(model)).eval()  # pyright: ignore[reportAssignmentType]
    for layer in list(model.modules()):
        if not parametrize.is_parametrized(layer):
            continue
        lists: Any = layer.parametrizations
        plain: dict[str, Tensor] = {}
        for name, chain in lists.items():
            value, stored = getattr(layer, name).detach().clone(), list(chain.parameters(recurse=False))
            plain[name] = nn.Parameter(value, any(p.requires_grad for p in stored)) if stored else value
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        others = dict(layer._parameters)
        layer._parameters.clear()
        for name, value in plain.items():  # in front: a weight comes before its bias
            if isinstance(value, nn.Parameter):
                layer.register_parameter(name, value)
            else:
                layer.register_buffer(name, value)
        layer._parameters.update(others)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return model


@torch.no_grad()
def _absorbed(layer: nn.Module, norm: _DecorrelatedBatchNorm, *, whitening_only: bool = False) -> nn.Module | None:
    """A new layer that is ``layer`` followed by the norm, or by its whitening matrix alone, without a shift; None where
    that is no layer of the same kind.

    Only torch's own classes are taken, without hooks: a subclass or a hook may do anything.
    """
    kind: Any = type(layer)
    if kind not in LAYERS or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    source: Any = layer
    weight, bias = source.weight.detach().double(), source.bias
    groups = 1 if kind is nn.Linear else source.groups
    channels = weight.shape[1] * groups if kind in TRANSPOSED else weight.shape[0]
    if channels != norm.num_features or (channels // groups) % (channels // norm.groups):
        return None
    if whitening_only:
        matrix, shift = _whitening(norm), None
    else:
        matrix, shift = norm.evaluation_map(torch.float64)
        shift = shift.to(weight.device)
    M = matrix.reshape(norm.groups, -1, channels // norm.groups).to(weight.device)

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
        moved = times(bias.detach().double())
        shift = moved if shift is None else shift + moved
    # The names of torch's own arguments are those of the attributes.
    form = [name for name in inspect.signature(kind).parameters if name not in ("bias", "device", "dtype")]
    where = {"device": source.weight.device, "dtype": source.weight.dtype}
    new: Any = kind(**{name: getattr(source, name) for name in form}, bias=shift is not None, **where)
    new.weight.copy_(mixed)
    if shift is not None:
        new.bias.copy_(shift)
    return new.requires_grad_(source.weight.requires_grad)


def _whitening(norm: _DecorrelatedBatchNorm) -> Tensor:
    """S (G, d, d) of evaluation, in double precision."""
    bare = copy.deepcopy(norm)
    bare.weight = bare.bias = None
    return bare.evaluation_map(torch.float64)[0]


@torch.no_grad()
def _as_batchnorm(norm: _DecorrelatedBatchNorm) -> nn.Module:
    """γ ∘ (x − S μ) + β of x that is whitened already, as a batch norm."""
    mean: Any = norm.running_mean
    like = mean if norm.weight is None else norm.weight
    kind: Any = BATCHNORMS[norm._dims[-1]]
    new = kind(norm.num_features, norm.batchnorm_eps, norm.momentum, norm.affine, device=like.device, dtype=like.dtype)
    S = _whitening(norm).reshape(norm.groups, -1, norm.num_features // norm.groups)
    new.running_mean.copy_((S @ mean.double().view(norm.groups, -1, 1)).flatten())
    new.running_var.fill_(1.0 - norm.batchnorm_eps)
    new.num_batches_tracked.copy_(norm.num_batches_tracked)
    if norm.affine:
        new.weight.copy_(norm.weight)
        new.bias.copy_(norm.bias)
        new.requires_grad_(like.requires_grad)
    return new


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
