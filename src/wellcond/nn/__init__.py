"""Spectral layers, in the manner of ``torch.nn``."""

from . import functional
from ._base import Observation, SpectralModule
from ._batchnorm_classes import register_batchnorm
from ._convert_sync import convert_sync
from ._fold import fold
from ._plain_copy import to_plain
from ._replace_batchnorm import replace_batchnorm
from ._update_statistics import update_statistics
from .covariance_pool import (
    GlobalCovariancePool1d,
    GlobalCovariancePool2d,
    GlobalCovariancePool3d,
    TokenCovariancePool,
)
from .decorrelated_batchnorm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
)
from .iter_norm import IterNorm1d, IterNorm2d, IterNorm3d
from .skew_orthogonal_conv import SkewOrthogonalConv2d
from .spectral_layer import SpectralLayer
from .subspace_layer import SubspaceLayer
from .whitening_coloring import WhiteningColoring

__all__ = [
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "GlobalCovariancePool1d",
    "GlobalCovariancePool2d",
    "GlobalCovariancePool3d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "Observation",
    "SkewOrthogonalConv2d",
    "SpectralLayer",
    "SpectralModule",
    "SubspaceLayer",
    "TokenCovariancePool",
    "WhiteningColoring",
    "convert_sync",
    "fold",
    "functional",
    "register_batchnorm",
    "replace_batchnorm",
    "to_plain",
    "update_statistics",
]
