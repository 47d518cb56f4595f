"""Converting a model back to plain ``torch.nn`` layers, with the state dict of the original.

Decorrelated batch norm in evaluation is y = γ ∘ S (x − μ) + β. If x = W u + b, the whitening matrix S is absorbed into
that layer, as S W and S b, and what is left, γ ∘ (x − S μ) + β, is a batch norm.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from wellcond._shared.models import bare_name, unwrapped

from ._base import replace_modules
from ._decorrelated_batchnorm import _DecorrelatedBatchNorm
from ._fold import absorbed, as_convolution, does_more, evaluation_whitening, fixed_norms, layers_of, replaced
from ._norm_and_tail import NormAndTail
from ._plain_weights import with_plain_weights
from .decorrelated_batchnorm import is_batchnorm
from .skew_orthogonal_conv import SkewOrthogonalConv2d

Model = TypeVar("Model", bound=nn.Module)
BATCHNORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def to_plain(model: Model, example_input: Any = None) -> Model:
    """A copy of ``model`` in evaluation mode, of plain ``torch.nn`` layers: treatments off, whitening folded in.

    Its state dict is that of the model without treatments and with ordinary batch norm, and loads wherever that one
    does: ``from_pretrained``, ``load_from_checkpoint``, ``load_state_dict``. Every parametrised weight becomes a plain
    one with the value in use. The whitening matrix of a decorrelated batch norm is absorbed into the layer before it,
    under the conditions of :func:`fold`; the rest becomes an ``nn.BatchNorm`` with its scale and shift and a running
    variance of 1 − ε. Without such a layer it becomes a 1 × 1 convolution, and a warning names it, since the state dict
    then differs.

    Layers without a counterpart in ``torch.nn`` are kept: :class:`GlobalCovariancePool2d` and its kin,
    :class:`SpectralLayer` and :class:`WhiteningColoring`, which have no state of their own, :class:`SubspaceLayer`, and
    :class:`SkewOrthogonalConv2d`. A convolution with an orthogonal weight of ``map="soc"`` becomes a
    :class:`SkewOrthogonalConv2d`, and a warning names it, since the shape of its filter differs.

    Args:
        model: any module; it is not changed. Wrappers (DDP, ``torch.compile``) are removed, and
            ``torch.compile`` from every part too.
        example_input: an input, to find the layer before each norm by running the model once: a tensor, a tuple of
            arguments, or a dict of keyword arguments. None for symbolic tracing.

    Returns:
        The copy, whose outputs differ from those of ``model.eval()`` by rounding.

    Raises:
        ValueError: a decorrelated batch norm without running statistics, which has no fixed map, or with forward hooks
            or a forward function of its own, which may do anything (naming it); the model does not run on the example
            input.

    Complexity: O(C²/groups) times the kernel entries of a channel, for each norm; one forward pass with an example.

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
    given, model = unwrapped(model), with_plain_weights(model)
    originals = {bare_name(name): module for name, module in given.named_modules()}
    others = {name for name, module in model.named_modules() if isinstance(module, SkewOrthogonalConv2d)}
    if skew := [f"'{name}'" for name in others if not isinstance(originals[name], SkewOrthogonalConv2d)]:
        warnings.warn(
            f"{', '.join(sorted(skew))}: a convolution of torch.nn is not skew-orthogonal, so it became a "
            "SkewOrthogonalConv2d, which the model without treatments does not have; load the state into a copy made "
            "by to_plain",
            stacklevel=2,
        )
    for name, module in model.named_modules():
        if isinstance(module, _DecorrelatedBatchNorm) and module.running_mean is None:
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) keeps no running statistics: its output depends on the "
                "batch, and no plain layer has it; train it with track_running_stats=True"
            )
        if why := does_more(module):
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) has {why}, which no plain layer has; put what it does into "
                "a module after the norm"
            )
    norms = fixed_norms(model)
    before = layers_of(model, norms, example_input)
    plain: dict[nn.Module, nn.Module] = {}
    alone = []
    for name, norm in norms.items():
        layer = before.get(norm)
        if layer is not None and (whitened := absorbed(layer, norm, whitening_only=True)) is not None:
            plain[layer], plain[norm] = whitened, _as_batchnorm(norm)
        else:
            plain[norm] = as_convolution(norm)
            alone.append(f"'{name}'")
    if alone:
        warnings.warn(
            f"{', '.join(alone)}: no layer before that the whitening folds into, so it became a 1 × 1 convolution, "
            "which the model with ordinary batch norm does not have; load the state into a copy made by to_plain",
            stacklevel=2,
        )
    return with_own_classes(replaced(model, plain))


def with_own_classes(model: Any) -> Any:
    """Restore the original classes of norms with a tail, where they hold an ordinary batch norm."""
    tails: dict[nn.Module, nn.Module] = {
        m: m.restored(m.norm) for m in model.modules() if isinstance(m, NormAndTail) and is_batchnorm(m.norm)
    }
    if model in tails:
        return tails[model]
    replace_modules(model, tails)
    return model


@torch.no_grad()
def _as_batchnorm(norm: _DecorrelatedBatchNorm) -> nn.Module:
    """γ ∘ (x − S μ) + β of whitened x, as a batch norm."""
    mean: Any = norm.running_mean
    like = mean if norm.weight is None else norm.weight
    kind: Any = BATCHNORMS[norm._dims[-1]]
    new = kind(norm.num_features, norm.batchnorm_eps, norm.momentum, norm.affine, device=like.device, dtype=like.dtype)
    S = evaluation_whitening(norm).reshape(norm.groups, -1, norm.num_features // norm.groups)
    new.running_mean.copy_((S @ mean.double().view(norm.groups, -1, 1)).flatten())
    new.running_var.fill_(1.0 - norm.batchnorm_eps)
    new.num_batches_tracked.copy_(norm.num_batches_tracked)
    if norm.weight is not None:
        new.weight.copy_(norm.weight)
        new.bias.copy_(norm.bias)
        new.requires_grad_(like.requires_grad)
    return new
