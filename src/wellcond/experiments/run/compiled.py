"""A network whose stages `torch.compile` has compiled, and whether it can on this machine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellcond.experiments.errors import ConfigError


def compile_stages(model: nn.Sequential) -> None:
    """Let the stages of a network of `build_model` run as one function that `torch.compile` makes; names stay.

    What surrounds them stays as it is: spectral layers and the layers that a treatment or a monitor acts on would be
    cut into pieces, each compiled again and again (measured with a whitening stem: four minutes for three blocks).
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
    """Compile one addition, for which whatever compiles on this machine has to be there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # of many kinds, with pages of advice
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"torch.compile does not work here ({why}): install a C++ compiler (on a GPU: Triton), or leave compile out"
        ) from error
