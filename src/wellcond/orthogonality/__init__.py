"""What is done to the layer before a spectral layer: its weight, its gradient, its learning rate, the loss."""

from ._names import TREATMENTS, parse_treatments
from .convolution_spectrum import convolution_singular_values
from .nearest_orthogonal_gradient import NearestOrthogonalGradient
from .optimal_learning_rate import OptimalLearningRate
from .orthogonal_loss import OrthogonalLoss
from .orthogonal_weight import orthogonal_weight
from .pre_spectral import pre_spectral_layers
from .spectral_norm import spectral_norm
from .treat import Treatment, treat

__all__ = [
    "TREATMENTS",
    "NearestOrthogonalGradient",
    "OptimalLearningRate",
    "OrthogonalLoss",
    "Treatment",
    "convolution_singular_values",
    "orthogonal_weight",
    "parse_treatments",
    "pre_spectral_layers",
    "spectral_norm",
    "treat",
]
