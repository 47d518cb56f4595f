"""Initialising what a checkpoint of transformers lacks, which it does itself only for the layers of ``torch.nn``."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    SkewOrthogonalConv2d,
    SpectralLayer,
    SubspaceLayer,
)
from wellcond.orthogonality import WeightTreatment

_LAYERS = (
    *(DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d),
    *(SkewOrthogonalConv2d, SpectralLayer, SubspaceLayer),
)


def init_missing(model: nn.Module) -> None:
    """Initialise what no checkpoint was loaded into: call it first in ``initialize_weights`` of your class.

    ``from_pretrained`` makes a model without values, loads what the checkpoint has, and calls ``initialize_weights``
    for the rest. ``PreTrainedModel`` knows the layers of ``torch.nn``; in others, the entries that the checkpoint lacks
    keep whatever the memory held.

    Decorrelated batch norm gets the running mean 0 and covariance I, scale 1 and shift 0; the other layers of
    :mod:`wellcond.nn` are drawn as they were when they were made, and treated weights as ``torch.nn`` draws those of
    convolutions and linear layers; a learned exponent is a half. What the checkpoint has stays, and so does every other
    module. A warning names the layers of which the checkpoint may have another form: a treated weight or an exponent
    that is missing where others were loaded, and a running mean without its covariance, as that of a plain batch norm.

    Args:
        model: the model, or a part of it.

    Complexity: as to make the layers. Source: the contract of ``PreTrainedModel.initialize_weights``.

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
        ...     def initialize_weights(self):
        ...         init_missing(self)
        ...         super().initialize_weights()
        >>> Net(PreTrainedConfig()).net[1].running_mean
        tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """
    loading = any(map(_is_loaded, [*model.parameters(), *model.buffers()]))
    of_other_form = []
    for name, module in model.named_modules():
        entries = _entries(module) if _is_ours(module) else {}
        loaded = {key: value.detach().clone() for key, value in entries.items() if _is_loaded(value)}
        if len(loaded) == len(entries):
            continue
        if isinstance(module, SpectralLayer):
            if loading:  # its start was lost, as the layer was made without values
                nn.init.constant_(entries["exponent"], 0.5)
                of_other_form.append(name)
        elif isinstance(module, parametrize.ParametrizationList):
            _draw(module)
            if loading:
                of_other_form.append(name.replace(".parametrizations.", "."))
        else:
            cast(Any, module).reset_parameters()
            with torch.no_grad():
                for key, value in loaded.items():
                    entries[key].copy_(value)
            if "running_mean" in loaded:
                of_other_form.append(name)
    if of_other_form:
        warnings.warn(
            f"the checkpoint has no values for {', '.join(of_other_form)}, perhaps because it is of a model without "
            "these norms and treatments: they start anew. Load it into that model, and replace and treat then",
            stacklevel=2,
        )


def _is_ours(module: nn.Module) -> bool:
    if isinstance(module, parametrize.ParametrizationList):
        return isinstance(module[0], WeightTreatment)
    return isinstance(module, _LAYERS)


def _draw(treated: parametrize.ParametrizationList) -> None:
    original = treated.original
    weight = torch.empty(getattr(treated[0], "plain_shape", original.shape), dtype=original.dtype)
    treated.right_inverse(nn.init.kaiming_uniform_(weight, a=5**0.5).to(original.device))


def _entries(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if not k.endswith("_extra_state")}


def _is_loaded(entry: Tensor) -> bool:
    return getattr(entry, "_is_hf_initialized", False)
