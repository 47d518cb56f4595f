"""Treatments of the layer before a spectral layer: of its weight, its gradient, its learning rate, or the loss."""

# The treatments in the order of the paper's tables; importing a file registers its treatment.
# isort: off
from ._spectral_norm import spectral_norm
from ._orthogonal_loss import LossTreatment, OrthogonalLoss
from ._orthogonal_weight import orthogonal_weight
from . import _skew_orthogonal_weight  # noqa: F401 - registers its map
from ._nearest_orthogonal_gradient import NearestOrthogonalGradient
from ._optimal_learning_rate import OptimalLearningRate

# isort: on
from ._convolution_spectrum import convolution_singular_values
from ._matrix import weight_matrices
from ._pre_spectral import layers_before, pre_spectral_layers
from ._registry import TREATMENTS, parse_treatments
from ._saved_weight import treat_like
from ._step_treatment import StepTreatment
from ._treat import treat
from ._treatment import Treatment
from ._weight_treatment import WeightTreatment

__all__ = [
    "TREATMENTS",
    "LossTreatment",
    "NearestOrthogonalGradient",
    "OptimalLearningRate",
    "OrthogonalLoss",
    "StepTreatment",
    "Treatment",
    "WeightTreatment",
    "convolution_singular_values",
    "layers_before",
    "orthogonal_weight",
    "parse_treatments",
    "pre_spectral_layers",
    "spectral_norm",
    "treat",
    "treat_like",
    "weight_matrices",
]
