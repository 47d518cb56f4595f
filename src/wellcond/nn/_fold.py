"""Folding decorrelated batch norm into the layer before it: in evaluation it is one affine map of the channels.

y = γ ∘ S (x − μ) + β = M x + (β − M μ) with M = diag(γ) S, block diagonal by groups. After x = W u + b that is the same
kind of layer, with the weight M W and the bias M b + β − M μ, whatever its stride, padding and dilation.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._base import replace_modules
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._hooks import has_forward_hooks, has_own_forward
from ._layers_before import LAYERS, TRANSPOSED, is_plain, layers_before
from ._plain_weights import with_plain_weights

Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model, example_input: Any = None) -> Model:
    """A copy of ``model`` in evaluation mode, without decorrelated batch norm: same outputs, less work.

    Each one is folded into the convolution, transposed convolution or linear layer before it (of a derived class too,
    if on trial it does nothing else), if the output of that layer goes nowhere else and, if it is grouped, no group of
    the norm mixes two of its groups. Otherwise it becomes a 1 × 1 convolution. Every parametrised weight (an orthogonal
    weight, a spectral norm) becomes a plain one. Linear layers are assumed to output (N, C). Ordinary ``nn.BatchNorm``
    is kept, as is a decorrelated one without running statistics, whose output depends on the batch, and, with a warning
    that names it, one that may do more than normalise: with forward hooks or a forward function of its own.
    :func:`to_plain` keeps the layers and names instead.

    Args:
        model: any module, in either mode; it is not changed. The copy is without ``torch.compile`` in any part.
        example_input: an input, for models that cannot be traced: a tensor, a tuple of arguments, or a dict of keyword
            arguments. The model is assumed to apply the same layers to every input.

    Returns:
        The copy, whose outputs differ from those of ``model.eval()`` by rounding.

    Raises:
        ValueError: the model does not run on the example input.

    Without an example the layers are found by symbolic tracing (``torch.fx``) of the modules that contain a
    decorrelated batch norm. If one cannot be traced, a warning says so, and every norm becomes a 1 × 1 convolution.

    Complexity: O(C²/groups) times the kernel entries of a channel, for each norm; one forward pass with an example.

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
    model = with_plain_weights(model)
    norms = fixed_norms(model)
    more = {name: why for name, m in model.named_modules() if (why := does_more(m))}
    if more:
        warnings.warn(
            "; ".join(f"layer '{name}' has {why}, which may do anything, so it is kept" for name, why in more.items()),
            stacklevel=2,
        )
    before = layers_of(model, norms, example_input)
    plain: dict[nn.Module, nn.Module] = {}
    for norm in norms.values():
        layer = before.get(norm)
        if layer is not None and (folded := absorbed(layer, norm)) is not None:
            plain[layer], plain[norm] = folded, nn.Identity()
        else:
            plain[norm] = as_convolution(norm)
    return replaced(model, plain)


def fixed_norms(model: nn.Module) -> dict[str, _DecorrelatedBatchNorm]:
    """The norms that are a fixed affine map in evaluation, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, _DecorrelatedBatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None and not does_more(norm)}


def does_more(norm: nn.Module) -> str:
    """What a decorrelated batch norm has that may do more than normalise; "" for nothing, and for any other module."""
    if not isinstance(norm, _DecorrelatedBatchNorm):
        return ""
    if has_own_forward(norm) or type(norm).forward is not _DecorrelatedBatchNorm.forward:
        return "a forward function of its own"
    return "forward hooks" if has_forward_hooks(norm) else ""


def layers_of(
    model: nn.Module, norms: dict[str, _DecorrelatedBatchNorm], example_input: Any
) -> dict[nn.Module, nn.Module]:
    return layers_before(model, example_input) if norms and model not in norms.values() else {}


def replaced(model: Any, new: dict[nn.Module, nn.Module]) -> Any:
    for module in new.values():
        module.eval()
    if model in new:
        return new[model]
    replace_modules(model, new)
    return model


class _ChannelMap(NamedTuple):
    """y ↦ M y + shift of tensors whose first dimension is the channels, with M (groups, d, d) block diagonal."""

    matrix: Tensor
    shift: Tensor | None

    def times(self, y: Tensor) -> Tensor:
        groups, d, _ = self.matrix.shape
        return (self.matrix @ y.reshape(groups, d, -1)).reshape(y.shape)

    def __call__(self, y: Tensor) -> Tensor:
        return self.times(y) if self.shift is None else self.times(y) + self.shift.view(-1, *[1] * (y.ndim - 1))


@torch.no_grad()
def absorbed(layer: nn.Module, norm: _DecorrelatedBatchNorm, *, whitening_only: bool = False) -> nn.Module | None:
    """A new layer equal to ``layer`` followed by the norm, or by its whitening matrix alone; None if that would be a
    layer of another kind.

    Hooks may do anything. So may a subclass of torch's layers, of which the result is tried out: one that pads as
    TensorFlow does is followed, one that standardises its weight first is not.
    """
    kind = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    if kind is None or has_forward_hooks(layer):
        return None
    if layer._parameters.get("weight") is None or "bias" not in layer._parameters:  # a class that computes them
        return None
    source: Any = layer
    weight, bias = source.weight.detach().double(), source.bias
    groups = 1 if kind is nn.Linear else source.groups
    channels = weight.shape[1] * groups if kind in TRANSPOSED else weight.shape[0]
    if channels != norm.num_features or (channels // groups) % (channels // norm.groups):
        return None
    matrix, shift = (evaluation_whitening(norm), None) if whitening_only else norm.evaluation_map(torch.float64)
    matrix = matrix.reshape(norm.groups, -1, channels // norm.groups).to(weight.device)
    of_norm = _ChannelMap(matrix, None if shift is None else shift.to(weight.device))
    if kind in TRANSPOSED:
        # (in, out/groups, *kernel): rows that are output channels come second, in each group of inputs.
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        mixed = of_norm.times(rows).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    else:
        mixed = of_norm.times(weight)
    moved = of_norm.shift if bias is None else of_norm(bias.detach().double())
    if not is_plain(layer) and not _follows(layer, mixed, moved, of_norm):
        return None
    return _with(layer, mixed, moved)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of ``layer`` with these values; a new bias is trained if the weight is."""
    new: Any = copy.deepcopy(layer)
    new.weight.copy_(weight)
    if bias is not None and new.bias is None:
        new.bias = nn.Parameter(bias.to(new.weight.dtype), new.weight.requires_grad)
    elif bias is not None:
        new.bias.copy_(bias)
    return new


def _follows(layer: nn.Module, weight: Tensor, bias: Tensor | None, of_norm: _ChannelMap) -> bool:
    """Whether ``layer`` with these values is ``layer`` followed by the map, in every channel, on random inputs of two
    sizes in double precision."""
    try:
        old = copy.deepcopy(layer).to("cpu", torch.float64).eval()
        tried = _with(old, weight.cpu(), None if bias is None else bias.cpu())
        of_norm = _ChannelMap(of_norm.matrix.cpu(), None if of_norm.shift is None else of_norm.shift.cpu())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_input_shape(layer), generator=generator, device="cpu", dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            for scaled in (x, 1e4 * x):
                expected, found = of_norm(old(scaled)[0]), tried(scaled)[0]
                size, off = (y.flatten(1).abs().amax(1) for y in (expected[:, None], (found - expected)[:, None]))
                # Rounding is eps times the condition of the whitening, at most 1e-10; no approximation is as close.
                if found.shape != expected.shape or not (off <= 1e-7 * size).all():
                    return False
    except Exception:  # the subclass's own code, which may refuse a dtype or an input: then it is not followed
        return False
    return True


def _input_shape(layer: Any) -> tuple[int, ...]:
    """Of one small input."""
    if isinstance(layer, nn.Linear):
        return (1, layer.in_features)
    sizes = (dilation * (kernel - 1) + 4 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True))
    return (1, layer.in_channels, *sizes)


def evaluation_whitening(norm: _DecorrelatedBatchNorm) -> Tensor:
    """S (G, d, d) of evaluation, in double precision."""
    bare = copy.deepcopy(norm)
    bare.weight = bare.bias = None
    return bare.evaluation_map(torch.float64)[0]


@torch.no_grad()
def as_convolution(norm: _DecorrelatedBatchNorm) -> nn.Module:
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
