"""Loading checkpoints of older versions of a layer, and of ``torch.nn.BatchNorm*d``."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from wellcond._shared.precision import HALF

KEYS = {"covariance": "running_cov", "whitening": "running_whitening"}


def upgrade(layer: Any, state: dict[str, Any], prefix: str) -> str | None:
    """Convert the entries of ``state`` to those that ``layer`` expects, in place; returns the reason if it cannot.

    A running variance becomes the diagonal of the running covariance (or of the whitening matrix).
    """
    if layer.running_mean is None:
        return None
    variance = state.pop(prefix + "running_var", None)
    if variance is not None:
        if variance.shape != (layer.num_features,):
            return f"running_var of shape {tuple(variance.shape)} is not that of {layer.num_features} channels"
        variance = variance.view(layer.groups, -1)
        if variance.dtype in HALF:  # a diagonal: each eigenvalue is as precise as its variance, also the least
            variance = variance.float()
        if layer.running == "covariance":
            state[prefix + "running_cov"] = torch.diag_embed(variance)
        else:
            unit = variance.mean(-1, keepdim=True) if layer.relative else 1.0  # of ε
            state[prefix + "running_whitening"] = torch.diag_embed((variance + layer.eps * unit).rsqrt())
    mine, other = layer.running, "whitening" if layer.running == "covariance" else "covariance"
    for name in (prefix + key for key in ("running_mean", *KEYS.values())):
        if name not in state or state[name].dtype not in HALF:
            continue
        dtype, state[name] = state[name].dtype, state[name].float()  # assign=True would not convert it
        if name != prefix + "running_mean":
            warnings.warn(
                f"{name} was saved in {dtype}: eigenvalues below {torch.finfo(dtype).eps:.0e} of the largest are "
                "rounding, and so is the whitening along them; save the statistics in float32",
                stacklevel=2,
            )
    if prefix + KEYS[other] in state and prefix + KEYS[mine] not in state:
        return (
            f"the checkpoint holds the running {other} of a layer made with running={other!r}, this one has "
            f"running={mine!r}; make it with running={other!r}, or train it further from new statistics"
        )
    return None
