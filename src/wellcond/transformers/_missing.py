"""Initialising what a checkpoint of transformers lacks, which it does itself only for the layers of ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    SkewOrthogonalConv2d,
    SubspaceLayer,
)
from wellcond.orthogonality import WeightTreatment

_LAYERS = (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    SkewOrthogonalConv2d,
    SubspaceLayer,
)


def init_missing(module: nn.Module) -> None:
    """Initialise the entries of one layer that no checkpoint was loaded into: call it first in ``_init_weights``.

    ``from_pretrained`` makes a model without values, loads what the checkpoint has, and asks the model's method
    ``_init_weights`` to initialise the rest, module by module. That of ``PreTrainedModel`` knows the layers of
    ``torch.nn``; in others, the entries that the checkpoint lacks keep whatever the memory held.

    Decorrelated batch norm gets the running mean 0 and covariance I, scale 1 and shift 0; the other layers of
    :mod:`wellcond.nn` are drawn as they were when they were made, and treated weights as ``torch.nn`` draws those of
    convolutions and linear layers. What the checkpoint has stays. Any other module is left alone.

    Args:
        module: what ``_init_weights`` was called with.

    Complexity: as to make the layer. Source: the contract of ``PreTrainedModel._init_weights``.

    Example:
        >>> from torch import nn
        >>> from transformers import PreTrainedConfig, PreTrainedModel
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> class Net(PreTrainedModel):
        ...     config_class = PreTrainedConfig
        ...
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.net = nn.Sequential(nn.Conv2d(3, 8, 3), DecorrelatedBatchNorm2d(8))
        ...         self.post_init()
        ...
        ...     def _init_weights(self, module):
        ...         init_missing(module)
        ...         super()._init_weights(module)
        >>> Net(PreTrainedConfig()).net[1].running_mean
        tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """
    known = isinstance(module, (*_LAYERS, parametrize.ParametrizationList))
    if not known or all(map(_is_loaded, _entries(module))):
        return
    if isinstance(module, _LAYERS):
        loaded = [(t, t.detach().clone()) for t in _entries(module) if _is_loaded(t)]
        module.reset_parameters()
        with torch.no_grad():
            for t, value in loaded:
                t.copy_(value)
    # Of a treated layer it is the list that is asked about; the layer only if other entries of it are missing.
    elif isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], WeightTreatment):
        original = module.original
        weight = torch.empty(getattr(module[0], "plain_shape", original.shape), dtype=original.dtype)
        module.right_inverse(nn.init.kaiming_uniform_(weight, a=5**0.5).to(original.device))


def _entries(module: nn.Module) -> list[Tensor]:
    named = module.state_dict(keep_vars=True).items()
    return [value for name, value in named if not name.endswith("_extra_state")]


def _is_loaded(entry: Tensor) -> bool:
    return getattr(entry, "_is_hf_initialized", False)
