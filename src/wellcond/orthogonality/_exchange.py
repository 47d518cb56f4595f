"""Replacing the values of a ``Parameter`` in place, so that its holders (an optimizer) see the new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer


def exchange(parameter: nn.Parameter, values: Tensor) -> None:
    """Put ``values`` into ``parameter`` and drop its gradient.

    A graph from before the exchange would make autograd expect gradients of the old shape; changing the dtype in
    between makes PyTorch forget that. PyTorch refuses to go backward through that graph ("modified by an inplace
    operation") instead of silently using the new values.
    """
    parameter.grad = None
    torch.autograd.graph.increment_version(parameter)
    between = torch.float64 if values.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=between, device=parameter.device)
    parameter.data = values


def start_afresh(optimizer: Optimizer, parameter: nn.Parameter, shape: torch.Size) -> None:
    """Discard the state of ``optimizer`` for a parameter that had ``shape``.

    A state that consists of tensors of that shape only (momentum) becomes zeros, as the fused SGD needs momentum for
    all of its parameters or for none. Any other state is recreated by the next step, as not all of it starts at zero;
    that of Adagrad is made here, since up to PyTorch 2.9 only its constructor makes it.
    """
    known = optimizer.state.pop(parameter, {})
    if known and isinstance(optimizer, torch.optim.Adagrad):
        (group,) = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        total = torch.full_like(parameter, group["initial_accumulator_value"], requires_grad=False)
        optimizer.state[parameter] = {"step": torch.zeros_like(known["step"]), "sum": total}
        return
    if known and all(isinstance(value, Tensor) and value.shape == shape for value in known.values()):
        optimizer.state[parameter] = {
            name: torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False) for name, value in known.items()
        }


def require_free(parameter: nn.Parameter, what: str) -> None:
    """Raise for a parameter held by ``DistributedDataParallel``, whose processes would silently diverge.

    The bare model does not show this, but DDP waits for the gradient, as a graph does that has not been freed.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and parameter.requires_grad and _awaited(parameter):
        raise ValueError(
            f"{what} gives it another parameter, and the gradient of the present one is awaited by "
            "DistributedDataParallel or by a loss that is still there; treat the model before it is wrapped and trained"
        )


def _awaited(parameter: nn.Parameter) -> bool:
    """Whether anything holds the node that accumulates the gradient: otherwise PyTorch creates a new one each time."""

    def notes() -> Any:
        return get_gradient_edge(parameter).node.metadata

    notes()["wellcond"] = True
    return "wellcond" in notes()
