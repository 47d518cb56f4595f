"""What to do where the layers before a spectral layer cannot be found: the ends of the messages."""

from __future__ import annotations

NAME_LAYERS = "name the layers to treat with layers=..."
GIVE_EXAMPLE = f"give an example_input, or {NAME_LAYERS}"


def raw_parameter(name: str) -> ValueError:
    """The refusal of a parameter that is used as a matrix, but is not the weight of a layer."""
    return ValueError(
        f"parameter '{name}' before the spectral layer is not the weight of a layer; pass it to "
        f"NearestOrthogonalGradient or OptimalLearningRate itself, or {NAME_LAYERS}"
    )
