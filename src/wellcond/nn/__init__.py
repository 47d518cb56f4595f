"""Spectral layers, in the manner of ``torch.nn``."""

from ._base import Observation, SpectralModule
from .covariance_pool import GlobalCovariancePool2d
from .decorrelated_batchnorm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    convert_sync,
)
from .iter_norm import IterNorm1d, IterNorm2d, IterNorm3d
from .spectral_layer import SpectralLayer

__all__ = [
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "GlobalCovariancePool2d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "Observation",
    "SpectralLayer",
    "SpectralModule",
    "convert_sync",
]
