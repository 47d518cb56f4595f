"""A model without DDP, DataParallel or ``torch.compile`` around it: names of layers do not depend on these."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers, whose own forward functions cannot be traced."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def bare_name(name: str) -> str:
    """The name of a module of an unwrapped model as if no part of it were compiled either."""
    return name.replace("._orig_mod", "")
