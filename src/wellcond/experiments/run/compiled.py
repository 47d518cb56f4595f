"""Compiling the stages of a network with `torch.compile`, and checking that it works on this machine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellcond.experiments.errors import ConfigError


def compile_stages(model: nn.Sequential) -> None:
    """Compile the stages of a network from `build_model` as one function; module names stay the same.

    The remaining layers are not compiled: graph breaks at spectral layers, treated and monitored layers would cause
    many recompilations (with a whitening stem, four minutes for three blocks).
    """
    parts = [*model.named_children()]
    inside = [i for i, (name, _) in enumerate(parts) if name.startswith("stage")]
    before, after = parts[: inside[0]], parts[inside[-1] + 1 :]

    def stages(x: Tensor) -> Tensor:
        for _, stage in parts[inside[0] : inside[-1] + 1]:
            x = stage(x)
        return x

    compiled = torch.compile(stages)

    def forward(input: Tensor) -> Tensor:
        for _, part in before:
            input = part(input)
        input = compiled(input)
        for _, part in after:
            input = part(input)
        return input

    model.forward = forward


def require_compiler() -> None:
    """Raise a `ConfigError` unless `torch.compile` can compile a trivial function here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # many types, with very long messages
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"torch.compile does not work here ({why}): install a C++ compiler (on a GPU: Triton), or leave compile out"
        ) from error
