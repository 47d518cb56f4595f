"""What treatments know about optimizers: which parameters they hold, and how their step depends on lr and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._matrix import Target


def _of_this_torch(names: str) -> tuple[type[Optimizer], ...]:
    return tuple(getattr(torch.optim, name) for name in names.split() if hasattr(torch.optim, name))


LINEAR_IN_LR = _of_this_torch("SGD Adam AdamW NAdam RAdam Adamax RMSprop Adagrad Adadelta Muon")
"""Optimizers whose step is lr times a direction, and whose state depends neither on lr nor on the actual step."""
_DECOUPLED = _of_this_torch("AdamW Muon")


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor still on the gradients if a fused optimizer unscales them itself, else None."""
    return getattr(optimizer, "grad_scale", None)


def decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """The fraction by which AdamW and Muon shrink the weight separately from the update: lr · weight_decay.

    Zero in a step that a fused optimizer skips itself under ``GradScaler``, which leaves all weights unchanged.
    """
    if not (isinstance(optimizer, _DECOUPLED) or group.get("decoupled_weight_decay")):
        return 0.0
    share = group["lr"] * group["weight_decay"]
    found_inf = getattr(optimizer, "found_inf", None)
    return share if found_inf is None else torch.where(found_inf == 0, share, 0.0)


def require_held(optimizer: Optimizer, target: Target, treatment: str) -> None:
    """Raise for a parameter that the optimizer does not update."""
    if not any(p is target.parameter for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{treatment} of {target.where}: the optimizer does not hold its weight; add it with "
            "optimizer.add_param_group, or build the optimizer from model.parameters()"
        )


def require_linear_in_lr(optimizer: Optimizer, treatment: str, target: Target) -> None:
    """Raise for an optimizer whose update direction cannot be derived from its step."""
    if not isinstance(optimizer, LINEAR_IN_LR):
        known = ", ".join(cls.__name__ for cls in LINEAR_IN_LR)
        raise ValueError(
            f"{treatment} of {target.where}: the update direction of {type(optimizer).__name__} is unknown, because "
            f"its step is not known to be proportional to the learning rate; use one of {known}"
        )
