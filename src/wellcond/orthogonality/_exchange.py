"""Other values, of any shape, in the same ``Parameter``, so that whoever holds it (an optimizer) holds the new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer


def exchange(parameter: nn.Parameter, values: Tensor) -> None:
    """Put ``values`` into ``parameter``, whose gradient ends.

    A graph that is still there from before would have autograd ask for gradients of the old shape: in between the
    parameter is of another dtype, which makes PyTorch forget that. Going backward through that graph is refused by
    PyTorch ("modified by an inplace operation"), instead of using the new values in silence.
    """
    parameter.grad = None
    torch.autograd.graph.increment_version(parameter)
    between = torch.float64 if values.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=between, device=parameter.device)
    parameter.data = values


def start_afresh(optimizer: Optimizer, parameter: nn.Parameter, shape: torch.Size) -> None:
    """Make ``optimizer`` forget what it knows of a parameter that was of ``shape``.

    What is nothing but tensors of that shape (momentum) becomes zeros, as the fused SGD wants momentum for all of its
    parameters or for none. Any other state is made anew by the next step: not all of it begins at zero.
    """
    known = optimizer.state.pop(parameter, {})
    if known and all(isinstance(value, Tensor) and value.shape == shape for value in known.values()):
        optimizer.state[parameter] = {
            name: torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False) for name, value in known.items()
        }


def require_free(parameter: nn.Parameter, what: str) -> None:
    """Refuse a parameter that ``DistributedDataParallel`` holds, whose processes would part in silence.

    It is not seen in a bare model, but it waits for the gradient, as a graph does that is not freed yet.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and parameter.requires_grad and _awaited(parameter):
        raise ValueError(
            f"{what} gives it another parameter, and the gradient of the present one is awaited by "
            "DistributedDataParallel or by a loss that is still there; treat the model before it is wrapped and trained"
        )


def _awaited(parameter: nn.Parameter) -> bool:
    """Whether anybody keeps the node that accumulates the gradient: else PyTorch makes a new one each time."""

    def notes() -> Any:
        return get_gradient_edge(parameter).node.metadata

    notes()["wellcond"] = True
    return "wellcond" in notes()
